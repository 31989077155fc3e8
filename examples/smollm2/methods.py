"""Methods of the study, as overrides of aropd.yaml."""

REFERENCE = "aropd_0.8"
SCALES = (0.4, 0.8, 1.4)
"""Values of lambda."""
_SFT = ["objective.name=sft", "objective.skip_response_tokens=0"]
_WITH_ANSWER = "views.partial_view=prefix_with_answer"

BASE = "base"
"""The model after the warm start, from which all methods start, without further training."""
MAIN: dict[str, list[str]] = {
    BASE: [],
    "sft": _SFT,
    "sft_release": [*_SFT, "objective.sft_prompt_loss=true", "objective.reduction=token_mean"],
    "full_opd": ["objective.residual_scale=1", "objective.residual_clip=null"],
    "partial_opd": ["objective.residual_scale=0"],
    "partial_opd_answer": ["objective.residual_scale=0", _WITH_ANSWER],
    **{f"aropd_{scale}": [f"objective.residual_scale={scale}"] for scale in SCALES},
}
"""The comparison. Settings that are not overridden are those of REFERENCE."""

LOSSES = ("top_20", "sampled_token")
"""Methods with the loss of the same name in other_losses.py."""
ABLATIONS: dict[str, list[str]] = {
    "kl_student_target": ["objective.divergence=kl_student_target"],
    "jsd": ["objective.divergence=jsd"],
    "bf16": ["model.dtype=bf16"],  # with an fp32 average
    "bf16_teacher_bf16": ["model.dtype=bf16", "teacher.fp32_master=false"],
    "teacher_frozen": ["teacher.kind=frozen"],
    "teacher_live": ["teacher.kind=live"],
    "clip_0.5": ["objective.residual_clip=0.5"],
    "clip_none": ["objective.residual_clip=null"],
    "rho_0.25": ["views.partial_ratio=0.25"],
    "rho_0.75": ["views.partial_ratio=0.75"],
    **{name: [] for name in LOSSES},
}
"""Ablations: each changes one setting of REFERENCE, or its loss. Only a bf16 model can have a bf16
average, which is therefore compared with `bf16`."""

METHODS = MAIN | ABLATIONS

RATES = (5e-6, 1e-5, 2e-5)
"""Learning rates of the grid."""
GRID = ("sft", "full_opd", "partial_opd", REFERENCE)
"""Methods of the grid, which chooses the learning rate on validation.jsonl."""
