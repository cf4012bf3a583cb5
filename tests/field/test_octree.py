"""The octree: the theorem, the cost, the settings and the failures."""

import doctest
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import ossnet.field.octree.refinement
import ossnet.field.octree.tree
from ossnet.errors import SettingsError
from ossnet.field.octree.refinement import refine
from ossnet.field.octree.strides import choose_path
from ossnet.field.octree.tree import Octree, decide

SIX = ndimage.generate_binary_structure(3, 1)


def look_up(volume: np.ndarray) -> Callable[[Any], Any]:
    """A function that answers from a dense array (X, Y, Z) or (K, X, Y, Z)."""

    def answer(voxels: np.ndarray) -> np.ndarray:
        values = volume[..., voxels[:, 0], voxels[:, 1], voxels[:, 2]]
        return values.T if volume.ndim == 4 else values

    return answer


def ball(shape: tuple[int, int, int], centre: tuple[float, ...], radius: float) -> np.ndarray:
    """Signed distance to a sphere in voxels, positive inside."""
    grid = np.indices(shape, dtype=np.float32)
    return radius - np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)))


def surface(labels: np.ndarray) -> tuple[int, int]:
    """|B1| and |B2|: voxels with a 6-neighbour of another label, inside structures and in all."""
    touched = np.zeros(labels.shape, dtype=bool)
    for axis in range(3):
        moved, other = np.moveaxis(labels, axis, 0), np.moveaxis(touched, axis, 0)
        differ = moved[1:] != moved[:-1]
        other[1:] |= differ
        other[:-1] |= differ
    return int((touched & (labels > 0)).sum()), int(touched.sum())


def random_map(seed: int, shape: tuple[int, int, int], classes: int, blur: float) -> np.ndarray:
    """Labels of smoothed noise: blobs, tubes, sheets and specks."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(classes, *shape)), (0, blur, blur, blur))
    noise[0] += 0.4 * noise.std()
    return noise.argmax(axis=0).astype(np.uint8)


def answered(octree: Octree, answer: Callable[[Any], Any]) -> np.ndarray:
    """Run an octree to its end; which voxels were evaluated."""
    hit = np.zeros(octree.shape, dtype=np.uint8)
    while (voxels := octree.query()) is not None:
        hit[tuple(voxels.T)] += 1
        octree.update(answer(voxels))
    assert hit.max() <= 1, "a location was asked twice"
    assert hit.sum() == octree.evaluated
    return hit > 0


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    classes=st.integers(2, 5),
    blur=st.floats(0.6, 4),
    path=st.sampled_from(
        ["auto", (8, 4, 1), (16, 8, 4, 1), (4, 2, 1), (8, 1), (1,), ((8, 8, 2), (4, 4, 1), (1, 1, 1))]
    ),
    start=st.sampled_from(["none", "labels", "noise"]),
)
def test_every_component_hit_is_exactly_right(
    seed: int, shape: tuple[int, int, int], classes: int, blur: float, path: Any, start: str
) -> None:
    truth = random_map(seed, shape, classes, blur)
    rng = np.random.default_rng(seed)
    prediction = None
    if start == "labels":
        prediction = rng.integers(0, classes, size=(3, 2, 4))
    elif start == "noise":
        prediction = rng.normal(size=(classes, 4, 3, 2))
    octree = Octree(shape, classes, path, prediction)
    hit = answered(octree, look_up(truth))
    labels = octree.labels()
    for label in range(classes):
        components, _ = ndimage.label(truth == label, SIX)
        reached = np.unique(components[hit & (components > 0)])
        assert (labels[np.isin(components, reached)] == label).all()
    assert (labels[hit] == truth[hit]).all()
    # The certificate itself: both sides of every surface of the result were evaluated.
    for axis in range(3):
        moved, known = np.moveaxis(labels, axis, 0), np.moveaxis(hit, axis, 0)
        differ = moved[1:] != moved[:-1]
        assert known[1:][differ].all()
        assert known[:-1][differ].all()


@settings(max_examples=25)
@given(radius=st.floats(7, 20), shift=st.tuples(*[st.floats(-3, 3)] * 3))
def test_a_ball_is_exact_and_cheap(radius: float, shift: tuple[float, float, float]) -> None:
    shape = (56, 48, 52)
    values = ball(shape, tuple(23 + s for s in shift), radius)
    truth = values > 0
    b1, b2 = surface(truth)
    lattice = 7 * 6 * 7
    by_logits, by_labels = refine(look_up(values), shape), refine(look_up(truth), shape)
    for found in (by_logits, by_labels):
        assert (found.labels == truth).all()
        assert found.evaluated >= b2
    assert by_logits.evaluated < 2.6 * b1 + lattice
    assert by_logits.evaluated <= 1.02 * by_labels.evaluated


@pytest.mark.parametrize(
    "kind", ["numpy", "torch", "bfloat16", "log-probabilities", "two classes", "labels", "bool"]
)
def test_all_kinds_of_answers_give_the_same_labels(kind: str) -> None:
    shape = (40, 33, 37)
    values = ball(shape, (20, 16, 18), 11.3)

    def answer(voxels: np.ndarray) -> Any:
        logits = look_up(values)(voxels)
        if kind == "torch":
            return torch.from_numpy(logits).requires_grad_()
        if kind == "bfloat16":
            return torch.from_numpy(logits).bfloat16()
        if kind == "two classes":
            return np.stack((-logits, logits), axis=1)
        if kind == "log-probabilities":
            log = torch.nn.functional.logsigmoid(
                torch.from_numpy(np.stack((-100 * logits, 100 * logits), axis=1))
            )
            return torch.where(log < -50, -torch.inf, log)
        if kind == "labels":
            return torch.from_numpy((logits > 0).astype(np.int64))
        return logits > 0 if kind == "bool" else logits.astype(np.float64)

    assert (refine(answer, shape, batch=100).labels == (values > 0)).all()


def test_a_logit_of_exactly_zero_is_outside_and_the_first_of_equal_classes_wins() -> None:
    labels, margins = decide(np.array([0.0, 1e-6, -1.0]))
    assert labels.tolist() == [0, 1, 0]
    np.testing.assert_allclose(margins, [0, 1e-6, 1])
    labels, margins = decide(
        np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 5.0], [0, -np.inf, -np.inf], [-np.inf] * 3])
    )
    assert labels.tolist() == [0, 2, 0, 0]
    assert margins is not None
    assert margins[:2].tolist() == [0, 3]
    assert margins[3] == 0
    assert np.isfinite(margins).all()


def test_four_classes_by_logits_cost_less_than_by_labels() -> None:
    shape = (64, 56, 60)
    fields = [ball(shape, c, r) for c, r in (((20, 20, 20), 13), ((40, 30, 30), 14), ((38, 20, 44), 11))]
    logits = np.stack([np.zeros(shape, dtype=np.float32), *fields])
    truth = logits.argmax(axis=0)
    by_logits = refine(look_up(logits), shape, classes=4)
    by_labels = refine(look_up(truth), shape, classes=4)
    assert (by_logits.labels == truth).all()
    assert (by_labels.labels == truth).all()
    assert by_logits.evaluated < by_labels.evaluated
    assert by_logits.evaluated < 1.3 * surface(truth)[1] + 7 * 7 * 8


def test_many_classes_take_sixteen_bits() -> None:
    shape = (24, 24, 24)
    truth = (np.indices(shape) // 4 * np.array([36, 6, 1]).reshape(3, 1, 1, 1)).sum(axis=0)
    assert truth.max() > 127
    found = refine(look_up(truth), shape, stride=4, classes=216)
    assert found.labels.dtype == np.uint16
    assert (found.labels == truth).all()


@pytest.mark.parametrize("kind", ["good", "wrong", "random"])
def test_a_start_array_predicts_and_never_decides(kind: str) -> None:
    shape = (96, 80, 72)
    values = ball(shape, (50, 42, 30), 23.0)
    truth = values > 0
    coarse = values[4::8, 4::8, 4::8]
    start = {"good": coarse, "wrong": -coarse, "random": np.random.default_rng(0).normal(size=(5, 7, 4))}[
        kind
    ]
    found = refine(look_up(values), shape, start=start)
    assert (found.labels == truth).all()
    if kind == "good":
        assert found.evaluated < refine(look_up(values), shape).evaluated
        assert (
            found.evaluated == refine(look_up(values), shape, start="predict", segmentation=start).evaluated
        )


def test_the_safety_lattice_finds_what_the_prediction_overlooks() -> None:
    shape = (64, 64, 64)
    values = ball(shape, (32, 32, 32), 12.0)
    nothing = np.full((4, 4, 4), -5.0)
    assert (refine(look_up(values), shape, start=nothing).labels == (values > 0)).all()
    octree = Octree(shape, start=nothing, safety=0)
    assert octree.query() is None
    assert octree.evaluated == 0
    assert not octree.labels().any()


def test_a_doubtful_prediction_is_asked_about_and_a_certain_one_is_not() -> None:
    shape = (64, 64, 64)
    values = ball(shape, (16, 16, 16), 12.0)
    # Nothing is predicted anywhere, but less surely so around the ball.
    nothing = np.full((4, 4, 4), -9.0)
    nothing[:2, :2, :2] = -5.0
    asked = []

    def ask(voxels: np.ndarray) -> np.ndarray:
        asked.append(voxels)
        return np.asarray(look_up(values)(voxels))

    found = refine(ask, shape, start=nothing, safety=0, doubt=8.0)
    assert (found.labels == (values > 0)).all()
    assert np.concatenate(asked).max() <= 40
    # An array of labels says nothing about how sure it is.
    everything = refine(
        look_up(values), shape, start=np.zeros((4, 4, 4), dtype=np.uint8), safety=0, doubt=8.0
    )
    assert (
        everything.evaluated
        == refine(look_up(values), shape, start=np.full((4, 4, 4), -9.0), safety=1).evaluated
    )
    assert (everything.labels == (values > 0)).all()


def test_the_label_map_takes_over_the_memory_of_the_octree() -> None:
    shape = (200, 190, 180)
    values = ball(shape, (90, 95, 88), 30.0)
    octree = Octree(shape)
    answered(octree, look_up(values))
    tracemalloc.start()
    labels = octree.labels()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.05 * labels.nbytes
    assert labels.flags.c_contiguous
    assert octree.labels() is labels
    assert (labels == (values > 0)).all()


def test_an_island_between_the_sites_is_missed_whole_and_hints_find_it() -> None:
    shape = (64, 64, 64)
    body, island = ball(shape, (24, 24, 24), 14.0), ball(shape, (52, 51, 53), 2.0)
    values = np.clip(np.maximum(body, island), -4, 4)
    truth = values > 0
    plain = refine(look_up(values), shape)
    assert (plain.labels == (body > 0)).all()
    hinted = refine(look_up(values), shape, margin=4.0, seeds=True)
    assert (hinted.labels == truth).all()
    assert hinted.evaluated < 1.35 * plain.evaluated


@pytest.mark.parametrize("shape", [(64, 64, 1), (64, 64, 3), (64, 1, 64)])
def test_hints_find_islands_in_few_slices_and_at_the_ends_of_scans(shape: tuple[int, int, int]) -> None:
    body, island = (
        ball(shape, tuple(0.0 if n < 64 else at for n in shape), radius)
        for at, radius in ((24.0, 14.0), (52.0, 2.5))
    )
    values = np.clip(np.maximum(body, island), -4, 4)
    assert (refine(look_up(values), shape).labels != (values > 0)).any()
    assert (refine(look_up(values), shape, seeds=True).labels == (values > 0)).all()


def test_hints_find_balls_as_often_as_promised() -> None:
    # Radius 1 / 1.5 / 2 in 70 / 89 / 99 % (ramp of 4 voxels), a stride-4 lattice alone 2 / 23 / 56
    # %.
    rng = np.random.default_rng(1)
    shape = (40, 40, 40)
    for radius, hinted_at_least in ((1.0, 0.5), (2.0, 0.9)):
        plain = found = 0
        for _ in range(25):
            values = np.clip(ball(shape, tuple(rng.uniform(14, 26, 3)), radius), -4, 4)
            truth = values > 0
            plain += bool((refine(look_up(values), shape).labels == truth).all())
            found += bool((refine(look_up(values), shape, margin=4.0, seeds=True).labels == truth).all())
        assert plain <= 0.25 * 25
        assert found >= hinted_at_least * 25


def test_trust_is_cheaper_and_nearly_right() -> None:
    shape = (72, 72, 72)
    values = ball(shape, (36, 35, 34), 24.3)
    truth = values > 0
    b1, _ = surface(truth)
    path = (8, 4, 2, 1)
    certain = refine(look_up(values), shape, path=path)
    trusting = refine(look_up(values), shape, path=path, trust=0.3)
    assert trusting.evaluated < 0.75 * certain.evaluated
    assert (trusting.labels != truth).sum() <= 0.002 * b1
    everything = refine(look_up(values), shape, path=path, trust=1.0)
    assert (everything.labels == truth).all()


def test_memory_stays_near_two_bytes_a_voxel() -> None:
    shape = (192, 192, 192)

    def answer(voxels: np.ndarray) -> np.ndarray:
        return 60.0 - np.linalg.norm(voxels - 96.0, axis=1)

    tracemalloc.start()
    octree = Octree(shape)
    while (voxels := octree.query()) is not None:
        tracemalloc.stop()
        values = answer(voxels).astype(np.float32)
        tracemalloc.start()
        octree.update(values)
    octree.labels()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * np.prod(shape)


def test_progress_counts_what_is_asked() -> None:
    shape = (40, 40, 40)
    values = ball(shape, (20, 20, 20), 12.0)
    octree = Octree(shape)
    seen = []
    while (voxels := octree.query()) is not None:
        assert octree.pending >= len(voxels)
        again = octree.query()
        assert again is not None
        assert (again == voxels).all()
        octree.update(look_up(values)(voxels))
        seen.append(len(voxels))
    assert octree.pending == 0
    assert octree.evaluated == sum(seen)
    assert octree.rounds == len(seen)
    reports: list[tuple[int, int]] = []
    refine(look_up(values), shape, progress=lambda done, open_: reports.append((done, open_)))
    assert [r[0] for r in reports] == np.cumsum(seen).tolist()


def test_paths() -> None:
    assert choose_path((200, 150, 90)) == ((8, 8, 8), (4, 4, 4), (1, 1, 1))
    assert choose_path((256, 256, 160))[0] == (16, 16, 16)
    assert choose_path((512, 512, 512))[0] == (16, 16, 16)
    assert choose_path((256, 256, 10)) == ((8, 8, 2), (4, 4, 2), (1, 1, 1))
    assert choose_path((5, 4, 3)) == ((1, 1, 1),)


@pytest.mark.parametrize(
    "settings_",
    [
        {"shape": (4, 0, 4)},
        {"classes": 1},
        {"path": (8, 3, 1)},
        {"path": (8, 4)},
        {"path": ()},
        {"path": (8, 4, 0)},
        {"path": (4, 4, 1)},
        {"start": np.zeros((2, 2))},
        {"start": np.full((2, 2, 2), 7)},
        {"start": np.full((2, 2, 2), np.nan)},
        {"start": np.zeros((3, 2, 2, 2))},
        {"region": ((0, 0, 0), (9, 8, 8))},
        {"region": ((4, 0, 0), (4, 8, 8))},
    ],
)
def test_settings_without_meaning_are_refused(settings_: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        Octree(**{"shape": (8, 8, 8), **settings_})


def test_answers_that_do_not_fit_are_refused() -> None:
    octree = Octree((8, 8, 8), path=(4, 1))
    with pytest.raises(SettingsError, match="no question"):
        octree.update(np.zeros(8))
    octree.query()
    for bad in (
        np.zeros(7),
        np.zeros((8, 1)),
        np.full(8, np.nan),
        np.full(8, 2),
        np.zeros((8, 5))[:, :, None],
    ):
        with pytest.raises(SettingsError):
            octree.update(bad)
    with pytest.raises(SettingsError, match="still has questions"):
        octree.labels()
    octree.update((np.arange(8) > 3).astype(np.float32) - 0.5)
    second = octree.query()
    assert second is not None
    with pytest.raises(SettingsError, match="in turn"):
        octree.update(np.zeros(len(second), dtype=np.int64))
    hinted = Octree((8, 8, 8), path=(4, 1), seeds=True)
    hinted.query()
    with pytest.raises(SettingsError, match="needs logits"):
        hinted.update(np.zeros(8, dtype=np.int64))


@pytest.mark.parametrize(
    "settings_", [{"batch": 0}, {"start": "best"}, {"start": "predict"}, {"start": "released", "classes": 3}]
)
def test_refine_refuses_settings_without_meaning(settings_: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        refine(lambda voxels: np.zeros(len(voxels)), (8, 8, 8), **settings_)


@pytest.mark.parametrize("module", [ossnet.field.octree.tree, ossnet.field.octree.refinement])
def test_the_examples_run(module: Any) -> None:
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0


def asked_for(octree: Octree, answer: Callable[[Any], Any]) -> np.ndarray:
    while (voxels := octree.query()) is not None:
        octree.update(answer(voxels))
    return octree.labels()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    blur=st.floats(0.6, 5),
    corners=st.tuples(*[st.tuples(st.integers(0, 47), st.integers(0, 47))] * 3),
    path=st.sampled_from(
        ["auto", (8, 4, 1), (16, 8, 4, 1), (4, 2, 1), (1,), ((8, 8, 2), (4, 4, 1), (1, 1, 1))]
    ),
    kind=st.sampled_from(["labels", "logits", "hints", "start"]),
)
def test_a_region_equals_the_whole_answer_whatever_the_function(
    seed: int, blur: float, corners: Any, path: Any, kind: str
) -> None:
    # Noise: the worst case, specks everywhere, most of them never hit.
    shape = (48, 40, 44)
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(3, *shape)), (0, blur, blur, blur)).astype(np.float32)
    field: np.ndarray = noise.argmax(axis=0) if kind == "labels" else 10 * noise
    options: dict[str, Any] = {"start": rng.normal(size=(3, 4, 5, 2))} if kind == "start" else {}
    if kind == "hints":
        options = {"margin": 1.0, "seeds": True}
    low = tuple(min(min(c), n - 1) for c, n in zip(corners, shape, strict=True))
    high = tuple(min(max(*c, lo + 1), n) for c, lo, n in zip(corners, low, shape, strict=True))
    whole = asked_for(Octree(shape, 3, path, **options), look_up(field))
    part = asked_for(Octree(shape, 3, path, region=(low, high), **options), look_up(field))
    assert (part == whole[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]).all()


def test_a_region_costs_what_the_box_costs() -> None:
    shape = (160, 160, 160)
    values = ball(shape, (80, 80, 80), 60.0)
    whole = refine(look_up(values), shape)
    for size, share in ((16, 0.07), (32, 0.16)):
        region = ((20, 80, 80), (20 + size, 80 + size, 80 + size))
        part = refine(look_up(values), shape, region=region)
        assert (part.labels == whole.labels[20 : 20 + size, 80 : 80 + size, 80 : 80 + size]).all()
        assert part.evaluated < share * whole.evaluated
        assert refine(look_up(values), shape, region=region, certain=False).evaluated < 0.75 * part.evaluated


def test_a_strand_that_enters_unseen_is_found_only_with_certainty() -> None:
    shape = (64, 64, 64)
    truth = np.zeros(shape, dtype=np.uint8)
    truth[8:24, 8:24, 8:24] = 1
    truth[23:60, 13, 13] = 1  # between the sites of all lattices
    region = ((40, 4, 4), (62, 22, 22))
    whole = refine(look_up(truth), shape)
    assert (whole.labels == truth).all()
    unproven = refine(look_up(truth), shape, region=region, certain=False)
    assert not unproven.labels.any()
    assert (refine(look_up(truth), shape, region=region).labels == truth[40:62, 4:22, 4:22]).all()
