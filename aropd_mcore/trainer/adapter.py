"""The adapter of a run and its base model, opened and checked."""

from dataclasses import dataclass

from aropd_mcore.config import Config, ConfigError
from aropd_mcore.convert.adapter import AdapterSpec, PeftFolder, base_fingerprint
from aropd_mcore.convert.source import HFSource
from aropd_mcore.plan.layout import build_adapter_spec


@dataclass(frozen=True)
class AdapterInputs:
    """Sizes of a run's adapter, and where it starts."""

    spec: AdapterSpec
    tensors: PeftFolder | None
    """Adapter that training starts from. None: a new one."""
    base_fingerprint: str
    """Hash of the base weights, by which a resumed run recognizes them."""


def open_adapter(config: Config, source: HFSource) -> AdapterInputs | None:
    """Open the adapter that training starts from (headers only). None for a run without adapter.

    Raises:
        ConfigError: a target matches no layer, or adapter.path is
            not an adapter of this model with the rank, alpha and targets of the section.
    """
    spec = build_adapter_spec(config, source.architecture)
    if spec is None:
        return None
    assert config.adapter is not None
    path, tensors = config.adapter.path, None
    if path is not None:
        try:
            tensors = PeftFolder(path, source.architecture)
        except ValueError as error:
            raise ConfigError(f"adapter.path: {error}") from error
        for name in ("rank", "alpha", "targets"):
            found, expected = getattr(tensors.spec, name), getattr(spec, name)
            if found != expected:
                raise ConfigError(
                    f"adapter.{name} {_text(expected)}: expected {_text(found)}, the value of the "
                    f"adapter in adapter.path {path}; set it to this value"
                )
    return AdapterInputs(spec, tensors, base_fingerprint(source))


def _text(value: object) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else f"{value:g}"  # type: ignore[str-format]
