"""AR-OPD training steps in plain PyTorch and transformers, written from METHOD.md only.

One process, one dense pass per sample and view, autograd through whole logits, torch's AdamW. The
module imports nothing from the package. All arithmetic is fp64, except for fp32 parts of
transformers' norms, so differences are rounding errors of the tested implementation.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from tests.support import oracles
from tests.support.tiny_adapters import read_adapter

BUCKETS = {
    "0-255": (0, 256),
    "256-511": (256, 512),
    "512-767": (512, 768),
    "768-1023": (768, 1024),
    "1024-": (1024, math.inf),
}
KLS = ("kl_full_partial", "kl_full_student", "kl_partial_student", "kl_target_student")
BY_POSITION = (*KLS, "hindsight_token_rate")


@dataclass(frozen=True)
class Sample:
    """Token ids of one row's three prompts and of its response."""

    student: tuple[int, ...]
    partial: tuple[int, ...]
    full: tuple[int, ...]
    response: tuple[int, ...]
    weight: float
    engine_logprobs: tuple[float, ...] = ()
    """Log-probs of the response by the sampling engine."""
    finished: bool = False
    """Whether the response ended with EOS."""
    num_thinking: int = 0
    """Number of tokens of the thinking span, with which the response begins."""
    teacher: str = ""
    """Name of the teacher, if there are several."""
    domain: str = ""


@dataclass(frozen=True)
class Method:
    """METHOD's symbols. With `sft`, the target is the response itself."""

    num_steps: int
    sft: bool
    scale: float
    clip: float | None
    divergence: str
    jsd_weight: float
    reduction: str
    skip: int
    gap: float
    floor: float
    teacher: str
    ema_rate: float
    lr: float
    min_lr: float
    warmup_ratio: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad: float
    router_aux: float = 0.0
    router_z: float = 0.0
    importance: str | None = None
    """Level of importance weights: `sequence` or `token`."""
    cap: float = 2.0
    temperature: float = 1.0
    """Divisor of the logits of all three views before the loss."""
    sft_prompt_loss: bool = False
    vocab_size: int | None = None
    """Number of tokens that the loss compares. None: all of the models' vocabulary."""
    span: str = "both"
    """Part of the responses in the loss: `both`, `thinking` or `answer`."""
    domains: tuple[str, ...] = ()
    """Domains with metrics of their own."""

    def loss_tokens(self, sample: Sample) -> slice:
        start, end = 0, len(sample.response)
        if self.span == "thinking":
            end = sample.num_thinking
        if self.span == "answer":
            start = sample.num_thinking
        return slice(min(start + self.skip, end), end)


@dataclass(frozen=True)
class OracleStep:
    """The metrics of a step, and the weights after it by their HF names."""

    metrics: dict[str, float]
    samples: list[tuple[float, float]]
    """Means of loss and residual over the loss tokens of each sample, NaN without one."""
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    """Empty with several teachers, which do not change."""


class Oracle:
    """A student, its teachers and its optimizer."""

    def __init__(
        self,
        folder: Path,
        method: Method,
        teachers: Mapping[str, Path] | None = None,
        adapter: Path | None = None,
    ):
        """
        Args:
            teachers: folders of the teachers' models by name, if `method.teacher` is `model`. A
                single one has the empty name.
            adapter: PEFT folder of the adapter that is trained in place of all weights.
        """
        self.method = method
        self.student = _load(folder)
        if adapter is not None:
            _adapt(self.student, *read_adapter(adapter))
        self.teachers = {name: _load(path) for name, path in (teachers or {}).items()}
        for teacher in self.teachers.values():
            missing = self.student.config.vocab_size - teacher.config.vocab_size
            if missing > 0:  # ids that the student can sample and the teacher does not embed
                embedding = teacher.get_input_embeddings()
                rows = embedding.weight.new_zeros(missing, embedding.embedding_dim)
                embedding.weight = torch.nn.Parameter(torch.cat([embedding.weight.detach(), rows]))
                teacher.tie_weights()
        if not self.teachers:
            if method.teacher == "live":
                self.teachers[""] = self.student
            elif method.teacher == "frozen":
                self.teachers[""] = _load(folder)  # the model without adapter
            else:
                self.teachers[""] = copy.deepcopy(self.student)
        matrices, vectors = [], []
        for name, weight in self.student.named_parameters():  # a tied head is not repeated
            if not weight.requires_grad:
                continue
            # The biases of gpt-oss' experts are one tensor of two dimensions.
            is_vector = weight.dim() == 1 or name.endswith("_bias")
            (vectors if is_vector else matrices).append(weight)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": method.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=method.betas,
            eps=method.eps,
        )
        self.num_done = 0
        self._router_inputs: list[Tensor] = []
        for module in self._routers:
            module.register_forward_hook(lambda _, args, __: self._router_inputs.append(args[0]))

    @property
    def _routers(self) -> list[torch.nn.Module]:
        return [m for name, m in self.student.named_modules() if name.endswith("mlp.gate")]

    def step(self, samples: Sequence[Sample], groups: Sequence[Sequence[int]] = ()) -> OracleStep:
        """Take a training step.

        Args:
            groups: indices of the samples of each microbatch, on which the routers' losses depend.
        """
        method = self.method
        self._router_inputs.clear()
        losses, metrics, offsets, are_thinking = [], [], [], []
        for sample in samples:
            loss_T, metrics_T = self._sft(sample) if method.sft else self._aropd(sample)
            losses.append(loss_T)
            metrics.append(metrics_T)
            first = 0 if method.sft_prompt_loss else method.loss_tokens(sample).start
            offsets.append(torch.arange(first, first + len(loss_T)))
            are_thinking.append(offsets[-1] < sample.num_thinking)
        loss = oracles.reduced_loss(losses, [s.weight for s in samples], method.reduction)
        minimized, routers = loss, {}
        if method.router_aux or method.router_z:
            aux, z = self._router_losses(len(samples), groups)
            minimized = loss + method.router_aux * aux + method.router_z * z
            routers = {
                "router_aux_loss": float(aux.detach()) / len(self._routers),
                "router_z_loss": float(z.detach()) / len(self._routers),
            }

        self.optimizer.zero_grad()
        minimized.backward()
        weights = [weight for weight in self.student.parameters() if weight.requires_grad]
        grads = [w.grad for w in weights if w.grad is not None]
        assert len(grads) == len(weights)
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        if method.clip_grad > 0:
            for grad in grads:
                grad *= min(1.0, method.clip_grad / float(norm))
        lr = self._lr()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.num_done += 1
        if method.teacher == "ema":
            with torch.no_grad():
                followers = [w for w in self.teachers[""].parameters() if w.requires_grad]
                for phi, theta in zip(followers, weights, strict=True):
                    phi.copy_((1 - method.ema_rate) * phi + method.ema_rate * theta)

        report = {"loss": float(loss.detach()), "grad_norm": float(norm), "lr": lr}
        joined = {name: torch.cat([m[name] for m in metrics]) for name in metrics[0]}
        report |= routers
        report |= _at_ends(method, samples, metrics)
        report |= self._means(joined, torch.cat(offsets), torch.cat(are_thinking))
        report |= self._by_group(samples, losses, metrics)
        means = [self._sample_means(m) for m in metrics]
        teacher = _weights(self.teachers[""]) if "" in self.teachers else {}
        return OracleStep(report, means, _weights(self.student), teacher)

    def _aropd(self, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        method = self.method
        student = self._logits(self.student, sample.student, sample)
        with torch.no_grad():
            teacher = self.teachers[sample.teacher]
            partial = self._logits(teacher, sample.partial, sample)
            full = self._logits(teacher, sample.full, sample)
        tokens = method.loss_tokens(sample)
        sampled = torch.tensor(sample.response[tokens], dtype=torch.int64)
        # Log-probs of the sampled distribution do not depend on the temperature of the loss.
        log_s = -oracles.cross_entropy(student.detach(), sampled)
        if method.vocab_size is not None:
            student, partial, full = (x[:, : method.vocab_size] for x in (student, partial, full))
            sampled = sampled.clamp(max=method.vocab_size - 1)
        student, partial, full = (x / method.temperature for x in (student, partial, full))
        losses = oracles.token_losses(
            student,
            partial,
            full,
            scale=method.scale,
            clip=method.clip,
            divergence=method.divergence,
            jsd_weight=method.jsd_weight,
        )
        metrics = oracles.token_metrics(
            student,
            partial,
            full,
            sampled,
            scale=method.scale,
            clip=method.clip,
        )
        log_f, log_p = metrics["logprob_full"], metrics["logprob_partial"]
        hindsight = (log_f - log_p > method.gap) & (log_p.exp() < method.floor)
        metrics["hindsight_token_rate"] = hindsight.double()
        metrics["unweighted_loss"] = losses.detach()
        if method.importance is not None:
            log_engine = torch.tensor(sample.engine_logprobs[tokens], dtype=torch.float64)
            ratio = (log_s - log_engine).exp()
            weights = ratio.clamp(max=method.cap)
            losses = losses * (weights if method.importance == "token" else weights.mean())
            metrics["engine_gap"] = (log_s - log_engine).abs()
            metrics["importance_ratio"] = ratio
            metrics["importance_capped"] = (ratio > method.cap).double()
            metrics["kl_engine_student"] = log_engine - log_s
        return losses, metrics

    def _sft(self, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        if self.method.sft_prompt_loss:
            sequence = torch.tensor([[*sample.student, *sample.response]])
            logits, targets = self.student(sequence).logits[0, :-1], sequence[0, 1:]
        else:
            logits = self._logits(self.student, sample.student, sample)
            tokens = self.method.loss_tokens(sample)
            targets = torch.tensor(sample.response[tokens], dtype=torch.int64)
        losses = oracles.cross_entropy(logits, targets)
        logprobs = torch.log_softmax(logits.detach(), -1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        logprob = {"logprob_student": -losses.detach(), "unweighted_loss": losses.detach()}
        return losses, {"cross_entropy": losses.detach(), "entropy_student": entropy} | logprob

    def _by_group(
        self,
        samples: Sequence[Sample],
        losses: Sequence[Tensor],
        metrics: Sequence[dict[str, Tensor]],
    ) -> dict[str, float]:
        """Compute the metrics of each named teacher and of each domain: those of a batch that has
        no other samples."""
        groups = {f"teacher/{name}": ("teacher", name) for name in self.teachers if name}
        groups |= {f"domain/{name}": ("domain", name) for name in self.method.domains}
        report: dict[str, float] = {}
        for group, (key, name) in groups.items():
            inside = [i for i, sample in enumerate(samples) if getattr(sample, key) == name]
            own = [losses[i].detach() for i in inside]
            report[f"num_loss_tokens/{group}"] = sum(map(len, own))
            if report[f"num_loss_tokens/{group}"]:
                weights = [samples[i].weight for i in inside]
                loss = oracles.reduced_loss(own, weights, self.method.reduction)
                report[f"loss/{group}"] = float(loss)
                for metric in KLS:
                    values = torch.cat([metrics[i][metric] for i in inside])
                    report[f"{metric}/{group}"] = float(values.mean())
        return report

    def _sample_means(self, metrics: dict[str, Tensor]) -> tuple[float, float]:
        """Compute a sample's mean loss and mean residual, as METHOD section 7 defines them."""
        residual = torch.tensor([])
        if not self.method.sft:
            residual = metrics["logprob_full"] - metrics["logprob_partial"]
            bound = math.inf if self.method.clip is None else self.method.clip
            residual = residual.clamp(-bound, bound)
        return float(metrics["unweighted_loss"].mean()), float(residual.mean())

    def _logits(self, model, prompt: tuple[int, ...], sample: Sample) -> Tensor:
        """Compute the logits that predict the response tokens in the loss, fp64 [T, V]."""
        tokens = torch.tensor([[*prompt, *sample.response]])
        return model(tokens).logits[0, len(prompt) - 1 : -1][self.method.loss_tokens(sample)]

    def _router_losses(
        self, num_samples: int, groups: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Compute both losses: a token-weighted mean over microbatches, then a sum over layers.

        There is no padding here.
        """
        routers = self._routers
        # Inputs are ordered by sample, then by layer. Only the student's inputs have a graph.
        inputs = [x.flatten(0, -2) for x in self._router_inputs if x.requires_grad]
        assert len(inputs) == num_samples * len(routers)
        num_tokens = sum(len(x) for x in inputs) // len(routers)
        num_chosen = self.student.config.num_experts_per_tok
        aux, z = torch.zeros(2, dtype=torch.float64)
        for layer, router in enumerate(routers):
            logits = [x @ router.weight.T for x in inputs[layer :: len(routers)]]
            assert sorted(i for group in groups for i in group) == list(range(num_samples))
            for group in groups:
                together = torch.cat([logits[i] for i in group])
                share = len(together) / num_tokens
                aux = aux + share * oracles.load_balancing_loss(together, num_chosen)
                z = z + share * oracles.z_loss(together)
        return aux, z

    def _lr(self) -> float:
        """Return the learning rate: linear warm-up from above 0, then a cosine to min_lr.

        Source: METHOD section 6.
        """
        method = self.method
        num_warmup = int(method.warmup_ratio * method.num_steps)
        if self.num_done < num_warmup:
            return method.lr * (self.num_done + 1) / (num_warmup + 1)
        done = (self.num_done - num_warmup) / (method.num_steps - num_warmup)
        return method.min_lr + (method.lr - method.min_lr) * (1 + math.cos(math.pi * done)) / 2

    def _means(
        self, metrics: dict[str, Tensor], offsets: Tensor, is_thinking: Tensor
    ) -> dict[str, float]:
        """Compute the means over the global batch's loss tokens of METHOD section 7."""
        report = {
            name: float(values.mean())
            for name, values in metrics.items()
            if not name.startswith(("logprob_", "unweighted_"))
        }
        report["num_loss_tokens"] = len(offsets)
        for name in metrics.keys() & {"engine_gap", "importance_ratio"}:
            report[f"{name}_max"] = float(metrics[name].max())
        if self.method.sft:
            return report
        report["residual_uptake"] = report["kl_partial_student"] - report["kl_full_student"]
        if report["kl_full_partial"] > 0:
            report["residual_capture_ratio"] = report["residual_uptake"] / report["kl_full_partial"]
        parts = {
            bucket: (offsets >= start) & (offsets < end) for bucket, (start, end) in BUCKETS.items()
        }
        if is_thinking.any():
            parts |= {"thinking": is_thinking, "answer": ~is_thinking}
        for part, inside in parts.items():
            if inside.any():
                for name in BY_POSITION:
                    report[f"{name}/{part}"] = float(metrics[name][inside].mean())
        return report


def _at_ends(
    method: Method, samples: Sequence[Sample], metrics: Sequence[dict[str, Tensor]]
) -> dict[str, float]:
    """Compute the mean P(EOS) at the last token of responses that ended with EOS.

    Source: METHOD section 7.
    """
    ends = [
        m
        for sample, m in zip(samples, metrics, strict=True)
        if sample.finished and method.loss_tokens(sample).stop == len(sample.response)
    ]
    ends = [m for m in ends if len(m["logprob_student"])]
    report = {"num_response_ends": len(ends)}
    for name in metrics[0]:
        if name.startswith("logprob_") and ends:
            probs = [math.exp(m[name][-1]) for m in ends]
            report[name.replace("logprob", "eos_prob")] = sum(probs) / len(probs)
    return report


def _load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        experts_implementation="eager",  # the grouped implementation lacks fp64
    ).eval()


_MIXTRAL = {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _stacked(name: str, whole: Tensor) -> dict[str, Tensor]:
    """Return the experts of gpt-oss by the names of this package, with a row per output.

    Gate and up alternate in transformers. Here, gate is above up.
    """
    experts = {}
    for index, expert in enumerate(whole):
        rows = expert.T if expert.dim() > 1 else expert
        if ".gate_up_proj" in name:
            rows = torch.cat([rows[::2], rows[1::2]])
        experts[f"{name}[{index}]"] = rows
    return experts


class _Adapted(torch.nn.Module):
    """Parametrization W + scale B A of a weight, or of the stacked weights of a layer's experts."""

    def __init__(self, pairs: Sequence[Sequence[tuple[Tensor, Tensor] | None]], scale: float):
        """
        Args:
            pairs: for each expert (one for a plain weight), A and B of each part of its rows.
        """
        super().__init__()
        self.scale = scale
        self.pairs = torch.nn.ModuleList(
            torch.nn.ModuleList(
                torch.nn.ParameterList([] if pair is None else list(pair)) for pair in parts
            )
            for parts in pairs
        )

    def forward(self, weight: Tensor) -> Tensor:
        is_stacked = weight.dim() == 3
        experts = []
        for parts, base in zip(self.pairs, weight if is_stacked else [weight], strict=True):
            rows = base.chunk(len(parts))
            sums = [
                part + self.scale * pair[1] @ pair[0] if len(pair) else part
                for part, pair in zip(rows, parts, strict=True)
            ]
            experts.append(torch.cat(sums))
        return torch.stack(experts) if is_stacked else experts[0]


def _adapt(model, pairs: dict[str, tuple[Tensor, Tensor]], scale: float) -> None:
    """Freeze a model and give it an adapter, by the names of linear layers."""
    model.requires_grad_(False)
    remaining = dict(pairs)
    for name, module in list(model.named_modules()):
        if name in remaining:
            adapted = _Adapted([[remaining.pop(name)]], scale)
            parametrize.register_parametrization(module, "weight", adapted)
        elif name.endswith(".experts"):
            for weight, leaves in (
                ("gate_up_proj", ("gate_proj", "up_proj")),
                ("down_proj", ("down_proj",)),
            ):
                experts = [
                    [remaining.pop(f"{name}.{index}.{leaf}", None) for leaf in leaves]
                    for index in range(len(getattr(module, weight)))
                ]
                parametrize.register_parametrization(module, weight, _Adapted(experts, scale))
    assert not remaining, f"no layers: {list(remaining)}"


def _named_weights(model) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters, with adapters merged."""
    for name, weight in model.named_parameters():
        if ".parametrizations." not in name:
            yield name, weight
        elif name.endswith(".original"):
            module, _, parameter = name.removesuffix(".original").partition(".parametrizations.")
            yield f"{module}.{parameter}", getattr(model.get_submodule(module), parameter)


def _weights(model) -> dict[str, Tensor]:
    weights = {}
    # The bias of a sigmoid router is a buffer, which training must not change.
    biases = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    for name, weight in [*_named_weights(model), *biases]:
        layer, _, fused = name.partition(".experts.")
        if fused and model.config.model_type == "gpt_oss":
            weights |= _stacked(name, weight.detach().clone())
            continue
        if not fused:
            weights[name] = weight.detach().clone()
        # transformers 5 has one tensor for all experts of a layer. Files have one per expert.
        for index, expert in enumerate(weight.detach().clone() if fused else ()):
            parts = expert.chunk(2) if fused == "gate_up_proj" else [expert]
            for part, tensor in zip(fused.removesuffix("_proj").split("_"), parts, strict=True):
                weights[f"{layer}.experts.{index}.{part}_proj.weight"] = tensor
    if model.config.model_type == "mixtral":  # its files use the names of the first release
        return {
            ".".join(_MIXTRAL.get(part, part) for part in name.split(".")): weight
            for name, weight in weights.items()
        }
    return weights
