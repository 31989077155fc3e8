"""YAML 1.2 core with unique keys: values, refused texts, and ConfigError as the only error."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aropd_mcore.config import Config, ConfigError
from aropd_mcore.config_file import dump_config, load_config
from aropd_mcore.yaml_core import dump_yaml, parse_yaml

HEAD = """output_dir: run
model: {path: model}
data: {train: [rows.jsonl]}
"""
TRAINING = "training: {num_steps: 2}\n"
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def load(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, text) for text in ("off", "on", "yes", "no", "y", "n", "Off", "NO", "tRue")),
        *((text, True) for text in ("true", "True", "TRUE")),
        *((text, False) for text in ("false", "False", "FALSE")),
        *((text, None) for text in ("", "null", "Null", "~", "# only a comment")),
        *((text, 32) for text in ("32", "032", "+32", "0o40", "0x20")),
        ("010", 10),
        ("-7", -7),
        ("0x1F", 31),
        *((text, text) for text in ("1_000", "0b11", "1:30", "12:30:00", "1-02:30:00", "3h55m")),
        *((text, text) for text in ("2026-11-28", "2026-11-28 10:00:00", "1e", "e5", "-a", ".")),
        *((text, 1e-5) for text in ("1e-5", "1E-5", "1.0e-05", "0.00001", ".1e-4", "1.e-5")),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1.5", -1.5),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("'032'", "032"),
        ('"off"', "off"),
        ("!!str 032", "032"),
        ("!!int '032'", 32),
        ("!!float 1", 1.0),
        ("<<", "<<"),
        ("=", "="),
        ("{a: &x [1, 2], b: *x}", {"a": [1, 2], "b": [1, 2]}),
        (
            "{a: &x {k: 1, l: 2}, b: {<<: *x, l: 3}}",
            {"a": {"k": 1, "l": 2}, "b": {"k": 1, "l": 3}},
        ),
        (
            "[&x {k: 1}, &y {k: 2, l: 2}, {<<: [*x, *y]}]",
            [{"k": 1}, {"k": 2, "l": 2}, {"k": 1, "l": 2}],
        ),
    ],
)
def test_parse_yaml_follows_the_core_schema(text, value):
    parsed = parse_yaml(text, "run.yaml")
    assert parsed == value and type(parsed) is type(value)


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: found key 'a' a second time, first in line 1"),
        ("a:\n  b: 1\n  c: 2\n  b: 1", "line 4: found key 'b' a second time, first in line 2"),
        ("[{a: 1, 'a': 2}]", "line 1: found key 'a' a second time"),
        ("x: &x {a: 1}\ny: {<<: *x, <<: *x}", "line 2: found key '<<' a second time"),
        ("a: 1\n1: 2", "line 2: found key 1, expected a name as key"),
        ("{true: 2}", "line 1: found key True, expected a name as key"),
        ("? [a]\n: 2", "line 1: found key ['a'], expected a name as key"),
        ("a: 1\n---\na: 2", "not YAML: line 2: expected a single document"),
        ("a:\n\tb: 1", r"not YAML: line 2: found character '\t' that cannot start any token"),
        ("a: &x [*x]", "line 1: found an alias inside the value of its own anchor; remove it"),
        ("a: &x {b: *x}", "line 1: found an alias inside the value of its own anchor; remove it"),
        ("a: *x", "not YAML: line 1: found undefined alias 'x'"),
        ("a: {<<: 3}", "line 1: expected a mapping or a list of mappings after <<"),
        (BOMB, "found more than 100000 values, aliases included"),
        ("[" * 5000, "found too many levels of nesting"),
        ("a: !!python/object:os.system {}", "unknown tag 'tag:yaml.org,2002:python/object:os"),
        ("a: !!python/none", "unknown tag 'tag:yaml.org,2002:python/none'; remove it"),
        ("a: !mine 3", "line 1: unknown tag '!mine'; remove it"),
        ("a: !!timestamp 2026-11-28", "unknown tag 'tag:yaml.org,2002:timestamp'; remove it"),
        ("a: !!set {b}", "unknown tag 'tag:yaml.org,2002:set'; remove it"),
        ("a: !!int many", "line 1: found 'many', expected a value of tag int"),
        ("\na: " + "9" * 5000, "line 2: the number '999"),
        (r'a: "\ud83d"', r"found '\ud83d', expected Unicode text without NUL characters"),
        (r'a: "\0"', r"found '\x00', expected Unicode text without NUL characters"),
        (r'a: "\UFFFFFFFF"', "not YAML: "),
        ("a: 1\nb: \a", r"not YAML: line 2: character '\x07': special characters"),
        ("a: @b", "not YAML: line 1: found character '@' that cannot start any token"),
        ("%YAML 3.0\n---\na: 1", "not YAML: line 1: found incompatible YAML document"),
    ],
)
def test_parse_yaml_of_a_bad_text_names_the_line(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "run.yaml")
    assert str(caught.value).startswith("run.yaml: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


# --- configurations ---


def test_repeated_section_is_refused(tmp_path):
    twice = "training: {num_steps: 2, global_batch_size: 8, seed: 7}\ntraining: {num_steps: 2}\n"
    with pytest.raises(ConfigError, match=r"run\.yaml: line 5: found key 'training' a second"):
        load(tmp_path, HEAD + twice)
    with pytest.raises(ConfigError, match=r"override 'views=.*line 1: found key 'partial_ratio'"):
        load(tmp_path, HEAD + TRAINING, "views={partial_ratio: 0.1, partial_ratio: 0.2}")


def test_off_is_a_string(tmp_path):
    sections = {"logging": "wandb", "guards": "loss_spike", "rollout": "importance"}
    text = "".join(f"{section}: {{{key}: off}}\n" for section, key in sections.items())
    overrides = [f"{section}.{key}=off" for section, key in sections.items()]
    for config in (
        load(tmp_path, HEAD + TRAINING + text),
        load(tmp_path, HEAD + TRAINING, *overrides),
    ):
        values = [getattr(getattr(config, section), key) for section, key in sections.items()]
        assert values == ["off"] * 3


def test_leading_zeros_are_decimal(tmp_path):
    text = HEAD + "training: {num_steps: 010, global_batch_size: 032}\n"
    for config in (
        load(tmp_path, text),
        load(tmp_path, HEAD + TRAINING, "training.num_steps=010", "training.global_batch_size=032"),
    ):
        assert (config.training.num_steps, config.training.global_batch_size) == (10, 32)


def test_times_and_dates_stay_strings(tmp_path):
    text = HEAD.replace("run", "2026-11-28") + TRAINING
    for time in ("1-02:30:00", "12:30:00", "3h55m", "'90m'"):
        config = load(tmp_path, text + f"limits: {{stop_before: {time}}}\n")
        assert config.limits.stop_before == time.strip("'")
    assert config.output_dir == Path("2026-11-28")


@pytest.mark.parametrize("nothing", ["", "\n#  max_prompt_tokens: 400", " {}", " null", " ~"])
def test_empty_section_has_its_defaults(tmp_path, nothing):
    text = HEAD + TRAINING + f"rollout: {{vllm:}}\nviews:{nothing}\n"
    assert load(tmp_path, text) == load(tmp_path, HEAD + TRAINING)
    config = load(tmp_path, text, "views.max_prompt_tokens=400", "rollout.vllm.servers=2")
    assert (config.views.max_prompt_tokens, config.rollout.vllm.servers) == (400, 2)
    assert load(tmp_path, HEAD + TRAINING + "views: {max_prompt_tokens: 4}", "views=").views == (
        load(tmp_path, HEAD + TRAINING).views
    )
    with pytest.raises(ConfigError, match=r"model\.path: missing; this key is required"):
        load(tmp_path, HEAD + TRAINING, "model=")


def test_null_of_a_setting_is_null(tmp_path):
    config = load(
        tmp_path,
        HEAD + TRAINING + "objective: {residual_clip: null}\nviews: {system_prompt: ~}\n",
        "rollout.kv_cache_tokens=null",
    )
    assert config.objective.residual_clip is config.views.system_prompt is None
    assert config.rollout.kv_cache_tokens is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.num_steps=true", "expected a number, found true"),
        ("optimizer.lr=true", "expected a number, found true"),
        ("rollout.async_steps=false", "expected a number, found false"),
        ("objective.residual_clip=false", "expected a number, found false"),
        ("rollout.kv_cache_tokens=true", "expected a number, found true"),
        ("objective.chunk_tokens=true", "expected a number, found true"),
        ("objective.metrics=yes", "expected true or false, found 'yes'"),
        ("objective.metrics=1", "expected true or false, found 1"),
        ("logging.wandb=false", "should be 'off', 'online' or 'offline', found False"),
        ("output_dir=true", "not a valid path.*, found True"),
    ],
)
def test_booleans_and_numbers_do_not_replace_each_other(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, HEAD + TRAINING, override)


def test_anchored_section_is_copied(tmp_path):
    """If two sections share an anchor, an override of one section does not change the other."""
    text = HEAD + TRAINING + "views: {partial_ratio: &half 0.5}\nobjective: {jsd_weight: *half}\n"
    config = load(tmp_path, text, "views.partial_ratio=0.25")
    assert (config.views.partial_ratio, config.objective.jsd_weight) == (0.25, 0.5)
    shared = "a: &x {k: {l: 1}}\nb: *x"
    tree = parse_yaml(shared, "run.yaml")
    tree["a"]["k"]["l"] = 2
    assert tree["b"] == {"k": {"l": 1}}


def test_the_last_of_several_overrides_wins(tmp_path):
    assert load(tmp_path, HEAD + TRAINING, "optimizer.lr=1", "optimizer.lr=2").optimizer.lr == 2


# --- any text, any tree ---

AMBIGUOUS = (
    *("off", "on", "yes", "no", "true", "null", "~", "", "032", "0o17", "0x1F", "1_000", "08"),
    *("1e-5", "1E5", ".5", "1.", ".inf", "1:30", "2026-11-28", "<<", "=", "- a", "a: b", "#a"),
    *(" a ", "a\n\nb \n", "\t", "\x85", "\u2028", "\ufeff", "'", '"', "\\", "{}", "[]", "*a", "&a"),
    *("!a", "%a", "@a", "`a", "? a", "| a", "> a", "---", "...", "\x07", "\N{GRINNING FACE}"),
)
STRINGS = st.sampled_from(AMBIGUOUS) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=120
)


@pytest.mark.slow
@FUZZ
@given(STRINGS, STRINGS, STRINGS, STRINGS)
def test_dumped_strings_come_back_equal(tmp_path, path, prompt, name, argument):
    config = Config.model_validate(
        {
            "output_dir": path,
            "model": {"path": path},
            "data": {"train": [path, "rows"]},
            "training": {"num_steps": 2},
            "views": {"system_prompt": prompt},
            "logging": {"wandb_project": name},
            "rollout": {"vllm": {"arguments": [argument], "devices": [name]}},
        }
    )
    assert load(tmp_path, dump_config(config)) == config


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | STRINGS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(STRINGS, inner, max_size=4),
    max_leaves=8,
)


@FUZZ
@given(TREES)
def test_dumped_trees_come_back_equal(tree):
    assert parse_yaml(dump_yaml(tree), "run.yaml") == tree


PIECES = st.sampled_from(
    (
        *("training", "num_steps", "views", "rollout", "a", ": ", ":", "\n", "\n  ", "- ", ", "),
        *("{", "}", "[", "]", "&x ", "*x", "<<: ", "!!", "!!int ", "!!python/object ", "? ", "| "),
        *("> ", "---\n", "...\n", "%YAML 1.1\n", "#", "'", '"', "\\", "\\x", "\\ud800", "\t"),
        *(".inf", ".nan", "1e999", "-0", "9" * 5000, "0x" + "f" * 6000, "null", "~", "\ufeff"),
    )
) | st.text(max_size=3)
KEYS = st.sampled_from([*Config.model_fields, "num_steps", "path", "train", "vllm", "lr", "x"])
CONFIGS = st.dictionaries(
    KEYS, st.dictionaries(KEYS | STRINGS, TREES, max_size=3) | TREES, max_size=4
)


def load_anything(folder: Path, text: str, overrides: list[str]) -> None:
    """Load the text, or raise a ConfigError whose lines fit a terminal."""
    path = folder / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_config(path, overrides)
    except ConfigError as error:
        message = str(error)
        assert message.encode()
        assert all(len(line) < 1000 and line.isprintable() for line in message.split("\n"))


@pytest.mark.slow
@FUZZ
@given(st.lists(PIECES, max_size=12).map("".join), st.lists(PIECES, max_size=6).map("".join))
@example('a: "\\UFFFFFFFF"', "training.num_steps=" + "0x" + "f" * 6000)
@example("? {a: b}\n: c", "a.b.c={[x]: y}")
@example("[" * 3000, "x=" + "[" * 3000)
def test_any_text_loads_or_is_refused(tmp_path, text, override):
    load_anything(tmp_path, text, [])
    load_anything(tmp_path, HEAD + TRAINING + text, [override])


@FUZZ
@given(CONFIGS, st.tuples(KEYS, KEYS, TREES))
def test_any_tree_loads_or_is_refused(tmp_path, tree, override):
    section, key, value = override
    load_anything(tmp_path, yaml.safe_dump(tree), [])
    value = yaml.safe_dump(value, default_flow_style=True)
    load_anything(tmp_path, HEAD + TRAINING, [f"{section}.{key}={value}"])
