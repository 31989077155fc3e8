"""Errors of invalid arguments state what was found and what is expected."""

import pytest
import torch

from aropd_mcore.numerics import (
    anchored_residual_logprobs,
    fused_linear_anchored_residual_kl,
    fused_linear_cross_entropy,
    sample_token_weights,
    vocab_parallel_anchored_residual_kl,
)

LOGITS = torch.zeros(3, 10)
IDS = torch.tensor([0, 1, 2])
TARGET = {"residual_scale": 0.8, "residual_clip": 5.0}


def logits_form(**changes):
    arguments = {
        "student_logits_TV": LOGITS,
        "partial_logits_TV": LOGITS,
        "full_logits_TV": LOGITS,
        "vocab_size": 9,
        **TARGET,
    }
    return vocab_parallel_anchored_residual_kl(**arguments | changes)


def fused(**changes):
    hidden, weight = torch.zeros(3, 4), torch.zeros(10, 4)
    arguments = {
        "student_hidden_TH": hidden,
        "student_weight_VH": weight,
        "partial_hidden_TH": hidden,
        "full_hidden_TH": hidden,
        "teacher_weight_VH": weight,
        "token_weights_T": torch.ones(3),
        "vocab_size": 9,
        **TARGET,
    }
    return fused_linear_anchored_residual_kl(**arguments | changes)


def cross_entropy(**changes):
    arguments = {
        "student_hidden_TH": torch.zeros(3, 4),
        "student_weight_VH": torch.zeros(10, 4),
        "target_ids_T": IDS,
        "token_weights_T": torch.ones(3),
        "vocab_size": 9,
    }
    return fused_linear_cross_entropy(**arguments | changes)


def weights(**changes):
    arguments = {
        "num_loss_tokens_N": IDS,
        "sample_weights_N": torch.ones(3),
        "reduction": "token_mean",
    }
    return sample_token_weights(**arguments | changes)


CASES = [
    (logits_form, {"full_logits_TV": torch.zeros(3, 9)}, r"full_logits_TV has shape \(3, 9\)"),
    (logits_form, {"student_logits_TV": torch.zeros(10)}, r"shape \(10,\).*two dimensions"),
    (
        logits_form,
        {"full_logits_TV": LOGITS.int()},
        r"full_logits_TV is torch\.int32: expected one",
    ),
    (logits_form, {"full_logits_TV": LOGITS.half()}, r"full_logits_TV torch\.float16: .*one dtype"),
    (logits_form, {"vocab_size": 11}, r"vocab_size 11 .*expected 1 to 10, .*1 shard\(s\) of 10"),
    (logits_form, {"vocab_size": 0}, "vocab_size 0 does not fit"),
    (logits_form, {"divergence": "kl"}, "'kl': .*kl_target_student, kl_student_target, jsd"),
    (logits_form, {"jsd_weight": 1.0}, r"jsd_weight 1\.0: expected 0 < jsd_weight < 1"),
    (logits_form, {"residual_scale": -0.1}, r"residual_scale -0\.1: .*>= 0"),
    (logits_form, {"residual_clip": 0.0}, r"residual_clip 0\.0: .*None for no clip"),
    (logits_form, {"residual_clip": float("inf")}, "residual_clip inf: .*None for no clip"),
    (logits_form, {"sampled_ids_T": torch.tensor([0, 9, 1])}, "holds 9: .*vocab_size 9"),
    (logits_form, {"sampled_ids_T": IDS.int()}, r"sampled_ids_T is torch\.int32 \(3,\)"),
    (fused, {"full_hidden_TH": torch.zeros(2, 4)}, r"full_hidden_TH .*\(2, 4\): expected \(3, 4\)"),
    (fused, {"partial_hidden_TH": None, "with_metrics": False}, "partial_hidden_TH is None"),
    (fused, {"full_hidden_TH": None, "residual_scale": 0.0}, "without metrics and sampled ids"),
    (fused, {"student_weight_VH": torch.zeros(10, 5)}, r"student_hidden_TH .*expected \(3, 5\)"),
    (fused, {"teacher_weight_VH": torch.zeros(8, 4)}, r"teacher_weight_VH .*expected \(10, 4\)"),
    (fused, {"student_hidden_TH": torch.zeros(3, 4).bfloat16()}, "expected one dtype"),
    (fused, {"token_weights_T": torch.ones(2)}, r"token_weights_T .*\(2,\): expected \(3,\)"),
    (fused, {"chunk_tokens": 0}, "chunk_tokens 0: expected at least 1, or auto"),
    (fused, {"sequence_parallel": True}, "sequence_parallel without tp_group"),
    (fused, {"main_grad_VH": torch.zeros(10, 5)}, r"\(10, 5\): expected torch\.float32 \(10, 4\)"),
    (fused, {"main_grad_VH": torch.zeros(10, 4).half()}, r"main_grad_VH is torch\.float16"),
    (fused, {"sampled_ids_T": torch.tensor([0, -1, 1])}, "sampled_ids_T holds -1"),
    (cross_entropy, {"main_grad_VH": torch.zeros(9, 4)}, r"main_grad_VH is .*\(9, 4\)"),
    (cross_entropy, {"target_ids_T": torch.tensor([0, 9, 1])}, "target_ids_T holds 9"),
    (weights, {"sample_weights_N": torch.tensor([1.0, -2.0, 1.0])}, "sample_weights_N holds -2"),
    (weights, {"sample_weights_N": torch.tensor([1.0, torch.nan, 1.0])}, "holds nan"),
    (weights, {"sample_weights_N": torch.ones(2)}, r"\(3,\) and sample_weights_N \(2,\)"),
    (weights, {"reduction": "mean"}, "expected one of sequence_mean, "),
]


@pytest.mark.parametrize("call, changes, message", CASES)
def test_invalid_argument_is_refused(call, changes, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_single_view_that_is_not_the_target_is_refused():
    one_view = {"with_metrics": False, "residual_scale": 1.0}
    fused(**one_view, residual_clip=None, partial_hidden_TH=None)
    fused(**one_view | {"residual_scale": 0.0}, full_hidden_TH=None)
    for changes in (
        {"residual_clip": None, "full_hidden_TH": None},
        {"residual_clip": 9.0, "partial_hidden_TH": None},
        {"residual_scale": 0.0, "partial_hidden_TH": None},
        {"residual_clip": None, "partial_hidden_TH": None, "sampled_ids_T": IDS},
    ):
        with pytest.raises(ValueError, match="hidden_TH is None: expected"):
            fused(**one_view | changes)


def test_dense_target_of_different_shapes_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 10\) and full_logprobs \(10,\)"):
        anchored_residual_logprobs(LOGITS, LOGITS[0], **TARGET)
