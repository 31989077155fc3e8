"""Memory and time of a teacher that is another model."""

from dataclasses import replace

import pytest

from aropd_mcore.config import ParallelConfig
from aropd_mcore.config_file import load_config
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.plan.cost import forward_flops, loss_flops, step_time
from aropd_mcore.plan.fit import build_planned_run, remedies
from aropd_mcore.plan.host_memory import PINNED, host_memory
from aropd_mcore.plan.memory import stage_memory, worst_stage
from aropd_mcore.plan.parameters import rank_parameters
from aropd_mcore.plan.setup import Setup, build_setup
from aropd_mcore.plan.teacher_models import TeacherModelPlan
from tests.conftest import REPO

SEVEN_B, LARGER = (
    read_architecture(REPO / "examples" / "clusters" / f"Qwen2.5-{size}-Instruct")
    for size in ("7B", "32B")
)
LARGER_LAYERS = LARGER.num_parameters - 2 * LARGER.hidden_size * LARGER.vocab_size
"""Number of parameters of all layers, with the final norm."""
FROZEN = Setup(SEVEN_B, tensor=4, pipeline=2, data=2, num_microbatches=8, teacher="frozen")


def taught(setup: Setup, *teachers: TeacherModelPlan) -> Setup:
    return replace(setup, teacher="model", teacher_models=teachers)


@pytest.mark.parametrize("place", ["device", "host"])
def test_teacher_equal_to_the_student_is_planned_as_a_frozen_one(place):
    """Only the checkpoint differs: it does not contain the teacher's 2 bytes per parameter."""
    frozen = replace(FROZEN, teacher_weights=place, teacher_hidden_states=place, teacher_fp8=True)
    model = taught(frozen, TeacherModelPlan("", SEVEN_B, place, place))
    for stage in range(2):
        assert stage_memory(model, stage) == stage_memory(frozen, stage)
    assert step_time(model) == step_time(frozen)
    by_kind = [host_memory(setup) for setup in (frozen, model)]
    assert by_kind[0]["always"] == by_kind[1]["always"]
    saved = [sum(phases["save"].values()) for phases in by_kind]
    of_teacher = stage_memory(model, 1).parameters.total * 2 / model.data * PINNED
    assert saved[0] - saved[1] == pytest.approx(of_teacher, rel=1e-4)  # stages differ by a norm


def test_larger_teacher_has_its_own_weights_states_and_products():
    frozen = replace(FROZEN, pipeline=1)
    model = taught(frozen, TeacherModelPlan("", LARGER))
    state = stage_memory(model, 0).state["teacher weights"]
    assert state == pytest.approx(LARGER.num_parameters * 2 / 4, rel=1e-3)
    states = [
        stage_memory(s, 0).phases["teacher"]["teacher hidden states"] for s in (model, frozen)
    ]
    assert states[0] / states[1] == 5120 / 3584
    tokens = frozen.sequence_tokens
    (ours, _), (theirs, _) = (forward_flops(a, tokens) for a in (SEVEN_B, LARGER))
    times = [step_time(setup) for setup in (model, frozen)]
    assert times[0].teacher / times[1].teacher == pytest.approx(theirs / ours, rel=0.1)
    assert times[0].communication > times[1].communication
    assert loss_flops(model) == 2 * 1024 * (3 * 3584 + 2 * 5120) * SEVEN_B.vocab_size
    one = step_time(replace(model, views_are_equal=True))
    assert one.teacher == times[0].teacher / 2 and one.student == times[0].student


def test_stages_of_a_teacher_with_other_layers_are_fitted():
    """7 of 28 layers leave 21 to the other stage. Of 64 layers, that would leave 57."""
    split = replace(FROZEN, pipeline=4, layers_in_first_stage=7)
    model = taught(split, TeacherModelPlan("", LARGER))
    assert model.stage_layers == (7, 7, 7, 7)
    assert model.of_teachers[0].stage_layers == (7, 19, 19, 19)
    model = replace(model, layers_in_first_stage=4)
    assert model.of_teachers[0].stage_layers == (4, 20, 20, 20)
    model = replace(model, architecture=replace(SEVEN_B, num_layers=26), layers_in_first_stage=5)
    assert model.of_teachers[0].stage_layers == (16, 16, 16, 16)


def test_every_teacher_is_counted_and_one_at_a_time_is_on_the_device():
    """Weights add up. Times are means, since responses are spread over the teachers."""
    parts = [TeacherModelPlan("small", SEVEN_B), TeacherModelPlan("large", LARGER)]
    ones, both = [taught(FROZEN, part) for part in parts], taught(FROZEN, *parts)

    def weights(setup: Setup) -> float:
        return stage_memory(setup, 0).state["teacher weights"]

    assert weights(both) == sum(map(weights, ones))
    times, (small, large) = step_time(both), map(step_time, ones)
    # Each teacher's pass has half of the microbatches, and its own bubbles.
    assert times.teacher > (small.teacher + large.teacher) / 2
    assert times.teacher_bubble > large.teacher_bubble
    assert times.student == pytest.approx((small.student + large.student) / 2)
    hosted = taught(FROZEN, *(part._replace(weights="host") for part in parts))
    visiting = [taught(FROZEN, part._replace(weights="host")) for part in parts]
    memory = [stage_memory(setup, 0) for setup in (hosted, *visiting)]
    assert memory[0].state["teacher weights"] == 0
    assert memory[0].phases["teacher"] == memory[2].phases["teacher"]
    pinned = [host_memory(setup)["always"]["teacher weights"] for setup in (hosted, *visiting)]
    assert pinned[0] == pytest.approx(sum(pinned[1:]))


def test_teacher_in_its_own_layout_is_counted_on_each_rank():
    """The student has 2 stages of 4 tensor ranks in 2 replicas, on 16 ranks."""
    wide, deep = ParallelConfig(tensor=8, sequence=True), ParallelConfig(tensor=2, pipeline=4)
    alike, tensor, stages = (
        taught(FROZEN, TeacherModelPlan("", LARGER, parallel=own)) for own in (None, wide, deep)
    )
    head = LARGER.hidden_size * SEVEN_B.vocab_size
    for stage in range(2):
        state = stage_memory(tensor, stage).state
        without_head = LARGER.num_parameters - head
        assert state["teacher weights"] == pytest.approx(without_head * 2 / 8, rel=1e-3)
        # The loss needs the head on the student's last stage.
        assert state.get("teacher output layer", 0) == (head * 2 / 4 if stage == 1 else 0)
        # Two of the teacher's four stages are on each stage of the student.
        (teacher,) = stages.of_teachers
        held = range(2 * stage, 2 * stage + 2)
        largest = max(rank_parameters(teacher, s).total for s in held)
        assert stage_memory(stages, stage).state["teacher weights"] == largest * 2
    of_stage = rank_parameters(teacher, 1).total
    assert of_stage == pytest.approx(LARGER_LAYERS / 2 / 4, rel=1e-4)  # norms are not split
    # Two replicas of the student, two of the teacher: as many views for each.
    assert [setup.of_teachers[0].num_microbatches for setup in (tensor, stages)] == [8, 8]
    (single,) = taught(
        FROZEN, TeacherModelPlan("", LARGER, parallel=ParallelConfig(tensor=8, pipeline=2))
    ).of_teachers
    assert (single.data, single.num_microbatches) == (1, 16)
    times = [step_time(setup) for setup in (alike, tensor, stages)]
    assert times[1].teacher_bubble == 0 < times[0].teacher_bubble < times[2].teacher_bubble
    assert times[1].communication > times[0].communication > times[2].communication
    assert len({(time.student, time.optimizer, time.rollout) for time in times}) == 1


def test_scored_hidden_states_are_on_the_teachers_last_stage_until_they_are_sent():
    """One replica of the teacher scores the microbatches of two of the student."""
    own = ParallelConfig(tensor=8, pipeline=2)
    phases = [
        stage_memory(taught(setup, TeacherModelPlan("", LARGER, parallel=own)), stage).phases
        for setup, stage in ((FROZEN, 0), (FROZEN, 1), (replace(FROZEN, pipeline=1, data=4), 0))
    ]
    view = 1024 * LARGER.hidden_size * 2
    received = [of_stage["teacher"].get("teacher hidden states", 0) for of_stage in phases]
    assert received == [0, 2 * 8 * view, 2 * 8 * view]
    exchanged = [of_stage["teacher"]["exchange of hidden states"] for of_stage in phases]
    # Of two replicas with four tensor ranks each, a rank of the teacher serves one rank.
    assert exchanged == [0, (2 * 8 + 1 + 1) * view, (2 * 24 + 1 + 2) * view]
    host = TeacherModelPlan("", LARGER, hidden_states="host", parallel=own)
    (always, _) = host_memory(taught(FROZEN, host)).values()
    assert always["teacher hidden states"] == 2 * 16 * view * PINNED


def test_own_layout_that_equals_the_students_changes_nothing():
    path = REPO / "examples" / "clusters" / "qwen2.5-32b-to-7b-16xh100.yaml"
    layouts = [["teacher.parallel=null"], ["teacher.parallel={tensor: 4, sequence: true}"]]
    plain, equal = (build_setup(load_config(path, layout), 16) for layout in layouts)
    assert plain == equal
    assert plain.of_teachers != build_setup(load_config(path), 16).of_teachers


def test_wider_layout_of_the_teacher_is_proposed_if_it_fits():
    path = REPO / "examples" / "clusters" / "qwen2.5-32b-to-7b-16xh100.yaml"
    config = load_config(path, ["teacher.parallel=null"])
    run = build_planned_run(config, 16, gpus_per_node=8, memory_bytes=35e9)
    changes = {remedy.change: remedy.peak for remedy in remedies(run)}
    change = "teacher.parallel.tensor=8 teacher.parallel.sequence=true"
    wider = load_config(path, ["teacher.parallel=null", *change.split()])
    assert changes[change] == worst_stage(build_setup(wider, 16)).peak < 35e9
