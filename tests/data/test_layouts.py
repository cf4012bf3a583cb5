"""Folders as people have them are understood; what is missing is named."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.files.nrrd_writer import write_nrrd

from ossnet.data.layouts import LAYOUTS, open_dataset
from ossnet.data.scans import images_in
from ossnet.data.splits import split
from ossnet.errors import DatasetError, VolumeError
from ossnet.evaluation.matching import match
from ossnet.evaluation.scoring import score
from ossnet.files.header import VolumeWarning
from ossnet.files.nifti import write_labels, write_volume
from ossnet.files.reading import read_labels
from ossnet.volume import MARK, LabelMap, Orientation, Volume

SHAPE = (4, 5, 6)
SHARED = Path(__file__).parents[3] / "shared" / "data"
shared = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.exists(), reason="needs the reference data beside the checkout"),
]


def image(path: Path, value: int = 1, channels: int = 1, shape: tuple[int, int, int] = SHAPE) -> None:
    data = (
        np.full((channels, *shape), value, np.int16)
        + np.arange(channels, dtype=np.int16)[:, None, None, None]
    )
    write_volume(Volume(data, np.eye(4)), path)


def label(path: Path, values: tuple[int, ...] = (0, 1)) -> None:
    data = np.zeros(SHAPE, np.uint16)
    data.flat[: len(values)] = values
    write_labels(LabelMap(data, np.eye(4)), path)


def describe(root: Path, **value: object) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(value))


def nnunet(root: Path, cases: tuple[str, ...] = ("a_1", "b"), channels: int = 2) -> Path:
    describe(
        root,
        channel_names={str(i): n for i, n in enumerate(("T2", "ADC")[:channels])},
        labels={"background": 0, "PZ": 1, "TZ": 2},
        numTraining=len(cases),
        file_ending=".nii.gz",
    )
    for case in cases:
        for channel in range(channels):
            image(root / "imagesTr" / f"{case}_{channel:04d}.nii.gz", channel)
        label(root / "labelsTr" / f"{case}.nii.gz", (0, 1, 2))
    return root


def test_nnunet(tmp_path: Path) -> None:
    data = open_dataset(nnunet(tmp_path / "d"))
    assert (data.layout, data.names, data.channel_names) == ("nnunet", ("a_1", "b"), ("T2", "ADC"))
    assert (dict(data.label_names), data.classes) == ({0: "background", 1: "PZ", 2: "TZ"}, 3)
    assert (data.label_map, data.splits, data.problems) == ({}, None, ())
    volume, labels = data.read(data["a_1"])
    assert volume.data[:, 0, 0, 0].tolist() == [0, 1]
    assert labels.names == data.label_names


def test_nnunet_test_images_are_what_is_segmented(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d")
    assert [c.name for c in images_in(root)] == ["a_1", "b"]
    image(root / "imagesTs" / "t_0000.nii.gz")
    image(root / "imagesTs" / "t_0001.nii.gz")
    for place in (root, root / "imagesTs"):
        (case,) = images_in(place)
        assert (case.name, len(case.images), case.label) == ("t", 2, None)
    assert open_dataset(root).names == ("a_1", "b")


def test_nnunet_with_listed_files(tmp_path: Path) -> None:
    image(tmp_path / "elsewhere" / "x.nii.gz")
    label(tmp_path / "elsewhere" / "y.nii.gz")
    describe(
        tmp_path / "d",
        channel_names={"0": "CT"},
        labels={"background": 0, "spleen": 1},
        dataset={"case": {"images": ["../elsewhere/x.nii.gz"], "label": "../elsewhere/y.nii.gz"}},
    )
    data = open_dataset(tmp_path / "d")
    assert data.names == ("case",)
    data.read(data["case"])


def test_values_that_are_not_consecutive_become_classes(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d", ("a",), 1)
    describe(root, channel_names={"0": "CT"}, labels={"background": 0, "liver": 3, "spleen": 7})
    label(root / "labelsTr" / "a.nii.gz", (0, 7, 3, 3))
    data = open_dataset(root)
    assert data.label_names == {0: "background", 1: "liver", 2: "spleen"}
    assert data.label_map == {3: 1, 7: 2}
    assert data.labels(data["a"]).data.flat[:4].tolist() == [0, 2, 1, 1]


def test_regions_are_taken_apart(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d", ("a",), 1)
    describe(root, channel_names={"0": "T1"}, labels={"background": 0, "whole": [1, 2], "core": 2})
    data = open_dataset(root)
    assert data.label_names == {0: "background", 1: "label 1", 2: "core"}
    assert data.regions == {"whole": (1, 2)}


def test_regions_are_of_classes_whatever_the_values(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d", ("a",), 1)
    describe(root, channel_names={"0": "T1"}, labels={"background": 0, "whole": [2, 7], "core": 7})
    assert open_dataset(root).regions == {"whole": (1, 2)}


def test_patients_of_cases_json(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d", ("a", "b", "patient001_ED"), 1)
    facts = {"a": {"group": "y", "patient": 7}, "b": {"patient": None, "group": "x"}, "unknown": {}}
    (root / "cases.json").write_text(json.dumps(facts))
    assert [c.group for c in open_dataset(root).cases] == ["7", "x", "patient001"]
    flat = {"a": "P1", "b.nii.gz": "P1", "patient001_ED": {"Patient_ID": 3}}
    (root / "cases.json").write_text(json.dumps(flat))
    assert [c.group for c in open_dataset(root).cases] == ["P1", "P1", "3"]
    for nothing in (["a", "b"], {"other": {"patient": 1}}):
        (root / "cases.json").write_text(json.dumps(nothing))
        with pytest.raises(DatasetError, match=r"cases.json: names no case of the data set"):
            open_dataset(root)
    (root / "cases.json").write_text("{")
    with pytest.raises(DatasetError, match=r"cases.json: cannot be read"):
        open_dataset(root)


def test_names_in_other_files_may_be_written_in_two_ways(tmp_path: Path) -> None:
    """As macOS writes ü: u with two dots."""
    apart = [unicodedata.normalize("NFD", f"Müller_{k}") for k in (1, 2)]
    root = nnunet(tmp_path / "d", tuple(apart), 1)
    (root / "cases.json").write_text(json.dumps({name: {"patient": "M"} for name in apart}))
    (root / "splits_final.json").write_text(json.dumps([{"train": apart[:1], "val": apart[1:]}]))
    data = open_dataset(root)
    assert data.names == ("Müller_1", "Müller_2")
    assert {case.group for case in data.cases} == {"M"}
    assert split(data, 0).validation == ("Müller_2",)


def test_a_region_of_one_label_is_its_name_only_where_it_has_no_other(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d")
    description = json.loads((root / "dataset.json").read_text())
    describe(root, **{**description, "labels": {"background": 0, "PZ": 1, "zone": [1], "TZ": [2]}})
    assert dict(open_dataset(root).label_names) == {0: "background", 1: "PZ", 2: "TZ"}


def test_decathlon(tmp_path: Path) -> None:
    pairs = []
    for name in ("b", "a"):
        image(tmp_path / "imagesTr" / f"{name}.nii.gz", channels=3)
        label(tmp_path / "labelsTr" / f"{name}.nii.gz")
        pairs.append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
    image(tmp_path / "imagesTr" / "._c.nii.gz")  # what macOS leaves in archives
    describe(
        tmp_path,
        modality={"0": "T1", "1": "T2", "2": "PD"},
        labels={"0": "background", "1": "tumour"},
        training=pairs,
        test=["./imagesTs/t.nii.gz"],
    )
    data = open_dataset(tmp_path)
    assert (data.layout, data.names, data.channel_names) == ("decathlon", ("a", "b"), ("T1", "T2", "PD"))
    assert data.read(data["a"])[0].data.shape == (3, *SHAPE)
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    data = open_dataset(tmp_path)
    assert data.names == ("a",)
    assert data.problems[0].where.endswith("b.nii.gz")
    with pytest.raises(DatasetError, match="no such file"):
        data.require_complete()


def test_nnunet_version_1(tmp_path: Path) -> None:
    for channel in range(2):
        image(tmp_path / "imagesTr" / f"a_{channel:04d}.nii.gz", channel)
    label(tmp_path / "labelsTr" / "a.nii.gz")
    describe(
        tmp_path,
        modality={"0": "T1", "1": "T2"},
        labels={"0": "background", "1": "tumour"},
        training=[{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    )
    data = open_dataset(tmp_path)
    assert [p.name for p in data["a"].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]


def test_nnunet_version_1_with_names_like_patterns(tmp_path: Path) -> None:
    for name in ("a[1]", "a1", "a1_2"):
        image(tmp_path / "imagesTr" / f"{name}_0000.nii.gz")
        label(tmp_path / "labelsTr" / f"{name}.nii.gz")
    describe(
        tmp_path,
        modality={"0": "T1"},
        labels={"0": "background", "1": "tumour"},
        training=[
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in ("a[1]", "a1", "a1_2")
        ],
    )
    data = open_dataset(tmp_path)
    assert {case.name: case.images[0].name for case in data.cases} == {
        name: f"{name}_0000.nii.gz" for name in ("a[1]", "a1", "a1_2")
    }


def brats(root: Path, name: str, channels: tuple[str, ...], seg: str, ending: str = ".nii.gz") -> None:
    for number, channel in enumerate(channels):
        image(root / name / f"{name}{channel}{ending}", number)
    label(root / name / f"{seg}{ending}", (0, 1, 2, 4) if channels[0] == "_flair" else (0, 1, 2, 3))


OLD, NEW = ("_flair", "_t1", "_t1ce", "_t2"), ("-t2f", "-t1n", "-t1c", "-t2w")


def test_brats_2020_with_the_misnamed_label(tmp_path: Path) -> None:
    root = tmp_path / "MICCAI_BraTS2020_TrainingData"
    brats(root, "BraTS20_Training_001", OLD, "BraTS20_Training_001_seg", ".nii")
    brats(root, "BraTS20_Training_355", OLD, "W39_1998.09.19_Segm", ".nii")
    (root / "survival_info.csv").write_text("")
    data = open_dataset(root)
    assert (data.layout, data.names, data.problems) == (
        "brats2020",
        ("BraTS20_Training_001", "BraTS20_Training_355"),
        (),
    )
    assert data.channel_names == ("flair", "t1", "t1ce", "t2")
    assert data.regions == {"whole tumour": (1, 2, 3), "tumour core": (1, 3)}
    volume, labels = data.read(data["BraTS20_Training_355"])
    assert volume.data[:, 0, 0, 0].tolist() == [0, 1, 2, 3]  # in the paper's order
    assert labels.data.flat[:4].tolist() == [0, 1, 2, 3]  # 4 is class 3
    # the folder of the one case, too
    assert len(open_dataset(root / "BraTS20_Training_355")) == 1


def test_brats_2023(tmp_path: Path) -> None:
    for visit in ("000", "001"):
        brats(tmp_path, f"BraTS-GLI-00005-{visit}", NEW, f"BraTS-GLI-00005-{visit}-seg")
    data = open_dataset(tmp_path)
    assert (data.layout, len(data), data.label_map) == ("brats2023", 2, {})
    assert {c.group for c in data.cases} == {"BraTS-GLI-00005"}
    assert data.image(data.cases[0]).data[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    # later years use 4 for something else: never silently class 3
    label(data.cases[0].label, (0, 4))
    with pytest.raises(VolumeError, match="label 4, which the data set does not declare"):
        data.labels(data.cases[0])


def test_brats_of_both_kinds(tmp_path: Path) -> None:
    brats(tmp_path, "BraTS2021_00006", OLD, "BraTS2021_00006_seg")
    brats(tmp_path, "BraTS-GLI-00000-000", NEW, "BraTS-GLI-00000-000-seg")
    data = open_dataset(tmp_path)
    assert (data.layout, len(data)) == ("brats", 2)
    for case in data.cases:
        assert data.labels(case).data.max() == 3


def test_brats_validation_cases_need_no_label(tmp_path: Path) -> None:
    brats(tmp_path, "BraTS2021_1", OLD, "BraTS2021_1_seg")
    (tmp_path / "BraTS2021_1" / "BraTS2021_1_seg.nii.gz").unlink()
    (case,) = images_in(tmp_path)
    assert (case.name, len(case.images)) == ("BraTS2021_1", 4)
    with pytest.raises(DatasetError, match="no cases with image and label"):
        open_dataset(tmp_path)


def test_a_folder_of_data_sets_names_them(tmp_path: Path) -> None:
    for name in ("Dataset001_A", "Dataset002_B"):
        image(tmp_path / name / "imagesTr" / "a_0000.nii.gz")
        (tmp_path / name / "dataset.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"holds 2 data sets .Dataset001_A, Dataset002_B. and is none"):
        open_dataset(tmp_path)


def test_lits(tmp_path: Path) -> None:
    for number in (0, 10):
        image(tmp_path / "Training Batch 1" / f"volume-{number}.nii")
        label(tmp_path / "segmentations" / f"segmentation-{number}.nii", (0, 1, 2))
    data = open_dataset(tmp_path)
    assert (data.layout, data.names) == ("lits", ("volume-0", "volume-10"))
    assert data.label_names[2] == "tumour"
    image(tmp_path / "test" / "test-volume-3.nii")
    assert [c.name for c in images_in(tmp_path / "test")] == ["volume-3"]


@pytest.mark.parametrize(
    ("images", "labels", "layout"),
    [
        ("images/a.nii.gz", "labels/a.nii.gz", "folders"),
        ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "folders"),
        ("img/img0001.nii.gz", "label/label0001.nii.gz", "folders"),
        ("Images/image_7.nii", "Masks/image_7.nii.gz", "folders"),
        ("scans/pat-3_ct.nii.gz", "segmentations/pat-3_seg.nii.gz", "folders"),
        ("a.nii.gz", "a_seg.nii.gz", "suffix"),
        ("deep/a_0000.nii.gz", "deep/a_label.nii.gz", "suffix"),
        ("p1/image.nii.gz", "p1/label.nii.gz", "case-folders"),
        ("p1/ct.nii.gz", "p1/segmentation.nii.gz", "case-folders"),
    ],
)
def test_plain_folders(tmp_path: Path, images: str, labels: str, layout: str) -> None:
    image(tmp_path / images, 7)
    label(tmp_path / labels, (0, 255))
    data = open_dataset(tmp_path)
    assert (data.layout, len(data), data.channel_names) == (layout, 1, ("image",))
    assert data.label_map == {255: 1}  # masks as programs for pictures write them
    volume, read = data.read(data.cases[0])
    assert volume.data.flat[0] == 7
    assert np.unique(read.data).tolist() == [0, 1]
    (case,) = images_in(tmp_path)
    assert case.images == data.cases[0].images


def test_plain_folders_with_channels(tmp_path: Path) -> None:
    for case in ("a", "b"):
        for channel in range(2):
            image(tmp_path / "images" / f"{case}_{channel:04d}.nii.gz", channel)
        label(tmp_path / "labels" / f"{case}.nii.gz")
    data = open_dataset(tmp_path)
    assert data.channel_names == ("channel 0", "channel 1")
    (tmp_path / "images" / "b_0001.nii.gz").unlink()
    data = open_dataset(tmp_path)
    assert data.names == ("a",)
    assert "lacks channel 1" in data.problems[0].reason
    with pytest.raises(DatasetError, match="lacks channel 1"):
        images_in(tmp_path / "images")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("images/patient_{}.nii.gz", "labels/patient_{}.nii.gz"),
        ("patient_{}.nii.gz", "patient_{}_seg.nii.gz"),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_four_digits_may_number_the_cases(tmp_path: Path, images: str, labels: str, first: int) -> None:
    numbers = [f"{n:04d}" for n in range(first, first + 3)]
    for number in numbers:
        image(tmp_path / images.format(number), int(number))
        label(tmp_path / labels.format(number))
    data = open_dataset(tmp_path)
    assert (data.names, data.problems) == (tuple(f"patient_{n}" for n in numbers), ())
    assert [data.image(case).data.flat[0] for case in data.cases] == [int(n) for n in numbers]
    # One without a label changes nothing for the others.
    (tmp_path / labels.format(numbers[2])).unlink()
    data = open_dataset(tmp_path)
    assert data.names == (f"patient_{numbers[0]}", f"patient_{numbers[1]}")
    assert [(Path(p.where).name, p.reason) for p in data.problems] == [
        (f"patient_{numbers[2]}.nii.gz", "has no label")
    ]
    assert len(images_in(tmp_path)) == 3
    # Scans alone: digits that do not begin at 0, or are more than a model has channels, are no channels.
    for number in numbers[:2]:
        (tmp_path / labels.format(number)).unlink()
    folder = (tmp_path / images).parent
    assert len(images_in(folder, 1)) == 3
    assert len(images_in(folder)) == (3 if first else 1)
    assert len(images_in(folder, 3)) == (3 if first else 1)


def test_undeclared_values_are_no_classes(tmp_path: Path) -> None:
    """Values 0 and 2 are declared, classes 0 and 1: a 1 in a file is neither."""
    root = nnunet(tmp_path / "d", ("a",))
    describe(
        root, channel_names={"0": "T2", "1": "ADC"}, labels={"background": 0, "tumour": 2}, numTraining=1
    )
    label(root / "labelsTr" / "a.nii.gz", (0, 2))
    data = open_dataset(root)
    assert np.unique(data.labels(data.cases[0]).data).tolist() == [0, 1]
    label(root / "labelsTr" / "a.nii.gz", (0, 1, 2))
    with pytest.raises(VolumeError, match=r"holds label 1, .* declared are 0, 2"):
        data.labels(data.cases[0])


def test_images_and_labels_that_are_swapped(tmp_path: Path) -> None:
    """Of integers: grey values may be labels as far as their type goes."""
    grey = np.random.default_rng(0).integers(0, 200, (6, 6, 6)).astype(np.uint8)
    mask = (grey > 100).astype(np.uint8)
    write_volume(Volume(mask[None], np.eye(4)), tmp_path / "images" / "a.nii.gz")
    write_labels(LabelMap(grey, np.eye(4)), tmp_path / "labels" / "a.nii.gz")
    (problem,) = open_dataset(tmp_path).problems
    assert "values" in problem.reason
    assert problem.fix == "Are images and labels swapped?"


def test_values_of_any_size_become_classes(tmp_path: Path) -> None:
    """Without a table as long as the largest value."""
    image(tmp_path / "images" / "a.nii.gz")
    data = np.zeros(SHAPE, np.uint32)
    data.flat[:2] = 7, 2**32 - 1
    write_labels(LabelMap(data, np.eye(4)), tmp_path / "labels" / "a.nii.gz")
    found = open_dataset(tmp_path)
    labels = found.labels(found.cases[0]).data
    assert (labels.dtype, np.unique(labels).tolist()) == (np.uint8, [0, 1, 2])


def test_one_file_with_several_channels(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.nii.gz", channels=3)
    label(tmp_path / "labels" / "a.nii.gz")
    data = open_dataset(tmp_path)
    assert len(data.channel_names) == 3
    image(tmp_path / "images" / "a.nii.gz", channels=2)
    with pytest.raises(VolumeError, match="2 channels, the data set has 3"):
        data.image(data.cases[0])


def test_incomplete_cases_are_problems(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d", ("a", "b", "c", "d"))
    (root / "imagesTr" / "a_0001.nii.gz").unlink()
    (root / "labelsTr" / "b.nii.gz").unlink()
    for channel in range(2):
        (root / "imagesTr" / f"c_{channel:04d}.nii.gz").unlink()
    image(root / "imagesTr" / "d_0000.nii")
    image(root / "imagesTr" / "e_0007.nii.gz")
    data = open_dataset(root)
    assert data.names == ()
    reasons = {(Path(p.where).name, p.reason) for p in data.problems}
    assert {
        ("a_0000.nii.gz", "case a lacks channel 1 of 2"),
        ("b_0000.nii.gz", "has no label"),
        ("c.nii.gz", "has no image"),
        ("d_0000.nii.gz", "a second image for case d"),
        ("e_0007.nii.gz", "is channel 7, but only 2 are declared"),
    } <= reasons
    assert all(p.fix for p in data.problems)


def test_labels_may_be_stored_in_another_voxel_order(tmp_path: Path) -> None:
    root = nnunet(tmp_path)
    plain = open_dataset(root)
    _, labels = plain.read(plain["b"])
    turned = labels.reoriented(Orientation(axes=(2, 0, 1), flips=(True, False, True)))
    write_labels(turned, root / "labelsTr" / "b.nii.gz")
    again = open_dataset(root)
    assert np.array_equal(again.read(again["b"])[1].data, labels.data)


def test_image_and_label_must_lie_on_each_other(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d", ("a",), 1)
    shifted = np.eye(4)
    shifted[0, 3] = 0.2
    write_labels(LabelMap(np.zeros(SHAPE, np.uint8), shifted), root / "labelsTr" / "a.nii.gz")
    data = open_dataset(root)
    with pytest.raises(VolumeError, match=r"labelsTr/a.nii.gz: does not lie on its image: .* 0.2 mm"):
        data.read(data["a"])


def test_descriptions_that_make_no_sense(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d", ("a",), 1)

    def refused(reason: str, **value: object) -> None:
        if value:
            describe(root, **value)
        with pytest.raises(DatasetError, match=reason):
            open_dataset(root)

    refused("'labels' is missing|not as the format", channel_names={"0": "CT"}, labels=[1, 2])
    refused("ignore", channel_names={"0": "CT"}, labels={"background": 0, "ignore": 1})
    refused(".png files", channel_names={"0": "CT"}, labels={"background": 0}, file_ending=".png")
    refused("not as the format", channel_names={"zero": "CT"}, labels={"background": 0})
    refused("'label' is missing", modality={"0": "CT"}, labels={"0": "b"}, training=[{"image": "a.nii.gz"}])
    (root / "dataset.json").write_text("{")
    refused("not valid JSON")
    (root / "dataset.json").write_text("[]")
    refused("not a JSON object")


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"background": 0, "a": -1}, "gives 'a' the label -1"),
        ({"background": 0, "a": 1, "b": 1}, "gives 'a' and 'b' the same label 1"),
        ({"background": 0, "a": 1e999}, "is not as the format wants it"),
    ],
)
def test_labels_that_mean_nothing_are_refused(tmp_path: Path, labels: dict[str, float], reason: str) -> None:
    root = nnunet(tmp_path / "d")
    description = json.loads((root / "dataset.json").read_text())
    describe(root, **{**description, "labels": labels})
    with pytest.raises(DatasetError, match=reason):
        open_dataset(root)


def test_a_description_of_windows(tmp_path: Path) -> None:
    file = nnunet(tmp_path / "d") / "dataset.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert open_dataset(file.parent).names == ("a_1", "b")


def test_what_is_no_data_set(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no", "no such folder"), (tmp_path, "no images")):
        with pytest.raises(DatasetError, match=reason):
            open_dataset(path)
        with pytest.raises(DatasetError, match=r"no such file or folder|no images"):
            images_in(path)
    image(tmp_path / "a.nii.gz")
    with pytest.raises(DatasetError, match="among 1 image"):
        open_dataset(tmp_path)
    with pytest.raises(DatasetError, match="a file, not a folder"):
        open_dataset(tmp_path / "a.nii.gz")
    with pytest.raises(DatasetError, match="no layout 'x'"):
        open_dataset(tmp_path, "x")
    with pytest.raises(DatasetError, match="needs it"):
        open_dataset(tmp_path, "nnunet")


def nrrd(path: Path, values: tuple[int, ...], names: dict[int, str] | None = None) -> None:
    data = np.zeros(SHAPE, np.uint8)
    data.flat[: len(values)] = values
    write_nrrd(path, data, np.eye(4), names)


@pytest.mark.parametrize(
    ("images", "labels", "layout"),
    [
        ("a.nrrd", "a.seg.nrrd", "suffix"),
        ("a.nrrd", "a_seg.nrrd", "suffix"),
        ("a.nrrd", "a_seg.seg.nrrd", "suffix"),
        ("a/volume.nrrd", "a/Segmentation.seg.nrrd", "case-folders"),
        ("a/MRHead.nrrd", "a/Segmentation.seg.nrrd", "slicer"),
        ("images/a.nrrd", "labels/a.seg.nrrd", "folders"),
        ("imagesTr/a_0000.nrrd", "labelsTr/a.nrrd", "nnunet"),
    ],
)
def test_files_of_slicer(tmp_path: Path, images: str, labels: str, layout: str) -> None:
    root = tmp_path / "d"
    if layout == "nnunet":
        named = {"background": 0, "atrium": 1, "valve": 2}
        describe(root, channel_names={"0": "MR"}, labels=named, file_ending=".nrrd")
    nrrd(root / images, (3, 5, 7))
    nrrd(root / labels, (0, 1, 2), {1: "atrium", 2: "valve", 3: "nowhere"})
    data = open_dataset(root)
    assert (data.layout, data.names, data.problems) == (layout, ("a",), ())
    assert dict(data.label_names) == {0: "background", 1: "atrium", 2: "valve"}
    volume, found = data.read(data["a"])
    np.testing.assert_allclose(volume.affine, np.eye(4))
    assert found is not None
    assert found.data.flat[:3].tolist() == [0, 1, 2]
    assert [c.images for c in images_in(root)] == [(root / images,)]


def test_a_segmentation_of_slicer_may_be_cropped(tmp_path: Path) -> None:
    nrrd(tmp_path / "a.nrrd", (3, 5, 7))
    affine = np.eye(4)
    affine[:3, 3] = (1, 2, 0)
    for ending in (".seg.nrrd", "_seg.nrrd"):
        write_nrrd(tmp_path / f"a{ending}", np.ones((2, 1, 2), np.uint8), affine, {1: "atrium"})
        data = open_dataset(tmp_path)
        if ending == "_seg.nrrd":  # any other label map is expected to be whole
            with pytest.raises(VolumeError, match="the shapes differ"):
                data.read(data["a"])
            continue
        volume, found = data.read(data["a"])
        assert found.shape == volume.shape
        assert np.argwhere(found.data).tolist() == [[x, 2, z] for x in (1, 2) for z in (0, 1)]
        (tmp_path / "a.seg.nrrd").unlink()


def test_segments_numbered_anew_in_each_file_are_known_by_their_names(tmp_path: Path) -> None:
    for case, names in (
        ("a", {1: "Atrium", 2: "valve"}),
        ("b", {1: "valve", 2: "atrium"}),
        ("c", {1: "Valve "}),
    ):
        nrrd(tmp_path / f"{case}.nrrd", (3, 5, 7))
        nrrd(tmp_path / f"{case}.seg.nrrd", (0, *names), names)
    data = open_dataset(tmp_path)
    assert (data.problems, data.label_map) == ((), {})
    assert dict(data.label_names) == {0: "background", 1: "Atrium", 2: "valve"}
    stored = {case: read_labels(tmp_path / f"{case}.seg.nrrd").data for case in "abc"}
    for case, classes in (("a", (0, 1, 2)), ("b", (0, 2, 1)), ("c", (0, 2))):
        np.testing.assert_array_equal(data.labels(data[case]).data, np.array(classes)[stored[case]])
    matched = match(tmp_path / "b.seg.nrrd", tmp_path)
    np.testing.assert_array_equal(matched.reference(matched.pairs[0]).data, data.labels(data["b"]).data)
    joined = LabelMap((stored["b"] > 0).astype(np.uint8), np.eye(4), names={1: "Atrium and valve"})
    replace(joined, origin=f"{MARK} 0123").save(tmp_path / "p" / "b.nii.gz")
    (row,) = score(match(tmp_path / "p", tmp_path, only_predicted=True))
    assert (row.name, row.scores.dice) == ("Atrium and valve", 1)
    for file in ("c.nrrd", "c.seg.nrrd"):
        (tmp_path / file).unlink()
    # A name that is written in two ways is no other structure.
    nrrd(tmp_path / "b.seg.nrrd", (0, 1, 2), {1: "Atrium", 2: "valves"})
    (problem,) = open_dataset(tmp_path).problems
    assert "label 2 is named 'valves', and 'valve' in a.seg.nrrd" in problem.reason
    # A segment without a name says nothing, and nor does a name that two of them have.
    for names in ({1: "valve"}, {1: "valve", 2: "Valve"}):
        nrrd(tmp_path / "b.seg.nrrd", (0, 1, 2), names)
        (problem,) = open_dataset(tmp_path).problems
        assert problem.where.endswith("b.seg.nrrd")
        assert "label 1 is named 'valve', and 'Atrium' in a.seg.nrrd" in problem.reason


def test_segments_must_be_those_of_the_description(tmp_path: Path) -> None:
    named = {"background": 0, "atrium": 1, "valve": 2}
    describe(tmp_path, channel_names={"0": "MR"}, labels=named, file_ending=".nrrd")
    nrrd(tmp_path / "imagesTr" / "a_0000.nrrd", (3, 5, 7))
    nrrd(tmp_path / "labelsTr" / "a.nrrd", (0, 1, 2), {1: "Valve", 2: "atrium"})
    data = open_dataset(tmp_path)
    with pytest.raises(VolumeError, match="otherwise than the data set"):
        data.labels(data["a"])


def test_segments_of_one_name_stay_apart(tmp_path: Path) -> None:
    nrrd(tmp_path / "a.nrrd", (3, 5, 7))
    nrrd(tmp_path / "a.seg.nrrd", (0, 1, 2), {1: "tissue", 2: "tissue"})
    assert dict(open_dataset(tmp_path).label_names) == {0: "background", 1: "tissue 1", 2: "tissue 2"}


def test_names_in_results_of_ours_are_those_of_classes(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.nii.gz")
    image(tmp_path / "images" / "b.nii.gz")
    label(tmp_path / "labels" / "a.nii.gz", (0, 2, 3))
    data = np.zeros(SHAPE, np.uint8)
    data.flat[:3] = (0, 1, 2)
    ours = LabelMap(data, np.eye(4), names={1: "label 2", 2: "label 3"}, origin=f"{MARK} 1")
    write_labels(ours, tmp_path / "labels" / "b.nii.gz")
    assert dict(open_dataset(tmp_path).label_names) == {0: "background", 1: "label 2", 2: "label 3"}


def test_copies_in_other_formats_do_not_count(tmp_path: Path) -> None:
    for folder in ("suffix", "folders", "listed"):
        (tmp_path / folder).mkdir()
    image(tmp_path / "suffix" / "a.nii.gz")
    label(tmp_path / "suffix" / "a_seg.nii.gz")
    nrrd(tmp_path / "suffix" / "a.seg.nrrd", (0, 1))
    image(tmp_path / "folders" / "images" / "a.nii.gz")
    nrrd(tmp_path / "folders" / "images" / "a.nrrd", (3, 5))
    label(tmp_path / "folders" / "labels" / "a.nii.gz")
    root = tmp_path / "listed"
    listed = [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}]
    describe(root, modality={"0": "MR"}, labels={"0": "background", "1": "part"}, training=listed)
    image(root / "imagesTr" / "a_0000.nii.gz")
    nrrd(root / "imagesTr" / "a_0000.nrrd", (3, 5))
    label(root / "labelsTr" / "a.nii.gz")
    for folder in ("suffix", "folders", "listed"):
        data = open_dataset(tmp_path / folder)
        assert data.problems == ()
        assert [path.name for path in (*data["a"].images, data["a"].label)] == [
            "a_0000.nii.gz" if folder == "listed" else "a.nii.gz",
            "a_seg.nii.gz" if folder == "suffix" else "a.nii.gz",
        ]
        assert [len(case.images) for case in images_in(tmp_path / folder)] == [1]


def test_scenes_of_slicer(tmp_path: Path) -> None:
    for case in ("p1", "p2"):
        nrrd(tmp_path / case / "2 T1 MPRAGE.nrrd", (3, 5))
        nrrd(tmp_path / case / "Segmentation.seg.nrrd", (0, 1))
    data = open_dataset(tmp_path)
    assert (data.layout, data.names, data.problems) == ("slicer", ("p1", "p2"), ())
    assert [case.name for case in images_in(tmp_path)] == ["p1", "p2"]
    nrrd(tmp_path / "p1" / "T2.nrrd", (3, 5))
    (problem,) = open_dataset(tmp_path).problems
    assert "second image" in problem.reason


def test_segmentations_of_slicer_are_no_scans(tmp_path: Path) -> None:
    for name in ("a.nrrd", "b.nrrd", "Segmentation.seg.nrrd"):
        nrrd(tmp_path / name, (0, 1))
    assert [case.name for case in images_in(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(("name", "what"), [("1.dcm", "DICOM files"), ("a.mgz", "[.]mgz files")])
def test_other_images_are_named(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / name).write_bytes(b"")
    for read in (open_dataset, images_in):
        with pytest.raises(DatasetError, match=f"but {what}.*Convert"):
            read(tmp_path)


def test_images_of_plain_folders(tmp_path: Path) -> None:
    image(tmp_path / "b.nii")
    image(tmp_path / "a.nii.gz")
    assert [c.name for c in images_in(tmp_path)] == ["a", "b"]
    assert images_in(tmp_path / "a.nii.gz")[0].images == (tmp_path / "a.nii.gz",)
    deep = tmp_path / "deep"
    image(deep / "x" / "c.nii.gz")
    label(deep / "labels" / "c.nii.gz")
    assert [c.images[0] for c in images_in(deep)] == [deep / "x" / "c.nii.gz"]


def test_folders_name_scans_of_one_name(tmp_path: Path) -> None:
    for case in ("p1", "p2"):
        image(tmp_path / "one" / case / "ct.nii.gz")
        for channel in ("0000", "0001"):
            image(tmp_path / "two" / case / f"image_{channel}.nii.gz")
    assert [c.name for c in images_in(tmp_path / "one")] == ["p1", "p2"]
    assert [(c.name, len(c.images)) for c in images_in(tmp_path / "two")] == [("p1", 2), ("p2", 2)]
    listed = [{"image": f"{c}/image.nii.gz", "label": f"{c}/label.nii.gz"} for c in ("p1", "p2")]
    root = tmp_path / "listed"
    for pair in listed:
        image(root / pair["image"])
        label(root / pair["label"])
    describe(root, modality={"0": "CT"}, labels={"0": "background", "1": "x"}, training=listed)
    assert open_dataset(root).names == ("p1", "p2")


def test_one_name_in_many_folders_is_many_scans(tmp_path: Path) -> None:
    for file in ("P1/t1.nii.gz", "P2/t1.nii.gz", "P2/t2_0000.nii.gz"):
        image(tmp_path / file)
    assert [c.name for c in images_in(tmp_path)] == ["P1_t1", "P2_t1", "P2_t2"]


def test_images_that_are_left_out_are_told(tmp_path: Path) -> None:
    for file in ("P1/a.nii.gz", "P2/b.nii.gz", "labels/c.nii.gz", "template.nii.gz"):
        image(tmp_path / file)
    with pytest.warns(VolumeWarning, match=r"2 more images are not \(P1.a\.nii\.gz, P2.b\.nii\.gz\)"):
        (case,) = images_in(tmp_path)
    assert case.name == "template"


def test_sessions_of_a_subject_belong_together(tmp_path: Path) -> None:
    for subject in ("01", "02"):
        for session in (1, 2):
            name = f"sub-{subject}_ses-{session}_T1w"
            image(tmp_path / f"{name}.nii.gz")
            label(tmp_path / f"{name}_seg.nii.gz")
    assert [c.group for c in open_dataset(tmp_path).cases] == ["sub-01", "sub-01", "sub-02", "sub-02"]


def test_results_in_the_folder_are_not_taken_for_scans(tmp_path: Path) -> None:
    image(tmp_path / "d" / "a.nii.gz")
    image(tmp_path / "d" / "a_seg.nii.gz")
    image(tmp_path / "d" / "results" / "a.nii.gz")
    assert open_dataset(tmp_path / "d").problems
    (tmp_path / "d" / "results" / "report.json").write_text('{"model": {"fingerprint": "0"}, "scans": {}}')
    data = open_dataset(tmp_path / "d")
    assert not data.problems
    assert [case.name for case in data.cases] == ["a"]
    assert len(images_in(tmp_path / "d" / "results")) == 1  # if it is asked for itself
    (tmp_path / "d" / "results" / "report.json").write_text('{"EchoTime": 1}')
    assert open_dataset(tmp_path / "d").problems


@pytest.mark.parametrize(
    "names",
    [
        ("sub-01_FLAIR", "patientA", "sub-03"),
        ("sub-01_T1", "sub-02_T1"),
        ("a", "b", "old_t1"),
        ("volume-1", "thorax", "c_0000"),
    ],
)
def test_names_like_those_of_other_data_sets_are_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        image(tmp_path / f"{name}.nii.gz")
    found = images_in(tmp_path, channels=1)
    assert {c.images for c in found} == {(tmp_path / f"{name}.nii.gz",) for name in names}


def test_what_is_trained_on_can_be_segmented(tmp_path: Path) -> None:
    for case in ("sub-01", "sub-02"):
        image(tmp_path / f"{case}_t1.nii.gz")
        label(tmp_path / f"{case}_t1_seg.nii.gz")
    cases = open_dataset(tmp_path).cases
    assert [(c.name, c.images) for c in images_in(tmp_path, 1)] == [(c.name, c.images) for c in cases]


def test_a_brats_case_that_lacks_a_file_is_named_where_most_are_whole(tmp_path: Path) -> None:
    for case in ("p1", "p2", "p3"):
        brats(tmp_path, case, ("_flair", "_t1", "_t1ce", "_t2"), f"{case}_seg")
    (tmp_path / "p2" / "p2_t2.nii.gz").unlink()
    with pytest.raises(DatasetError, match="case p2 lacks channel 3 of 4"):
        images_in(tmp_path, 4)
    assert len(images_in(tmp_path, 1)) > 3  # for a model of one channel each file is a scan


def test_cases_of_the_decathlon_may_end_in_four_digits(tmp_path: Path) -> None:
    describe(
        tmp_path,
        modality={"0": "CT"},
        labels={"0": "background", "1": "liver"},
        training=[{"image": "./imagesTr/liver_0001.nii.gz", "label": "./labelsTr/liver_0001.nii.gz"}],
    )
    image(tmp_path / "imagesTr" / "liver_0001.nii.gz")
    label(tmp_path / "labelsTr" / "liver_0001.nii.gz")
    assert [c.name for c in images_in(tmp_path, 1)] == ["liver_0001"]
    for number in (11, 12, 13):
        image(tmp_path / "imagesTs" / f"liver_{number:04d}.nii.gz")
    assert [c.name for c in images_in(tmp_path, 1)] == ["liver_0011", "liver_0012", "liver_0013"]


def test_labels_that_a_model_drew_are_labels_and_results_beside_labels_are_none(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d", ("a", "b"), 1)
    for name in ("labelsTr/a", "labels/b"):
        drawn = LabelMap(np.ones(SHAPE, np.uint8), np.eye(4), origin=f"{MARK} 0123")
        write_labels(drawn, root / f"{name}.nii.gz")
    for folder in ("labelsTr", "labels"):
        (root / folder / "a_report.json").write_text('{"model": {"fingerprint": "0"}, "scans": {}}')
    assert [c.name for c in open_dataset(root).cases] == ["a", "b"]
    image(tmp_path / "e" / "images" / "a.nii.gz")
    label(tmp_path / "e" / "masks" / "a.nii.gz")
    (root / "labels").rename(tmp_path / "e" / "segmentations")
    (tmp_path / "e" / "segmentations" / "b.nii.gz").rename(tmp_path / "e" / "segmentations" / "a.nii.gz")
    found = open_dataset(tmp_path / "e")
    assert not found.problems
    assert [c.label for c in found.cases] == [tmp_path / "e" / "masks" / "a.nii.gz"]


def test_a_result_beside_its_scan_hides_no_scans(tmp_path: Path) -> None:
    image(tmp_path / "pa" / "a.nii.gz")
    image(tmp_path / "pb" / "b.nii.gz")
    (tmp_path / "pa" / "a_seg_report.json").write_text('{"model": {"fingerprint": "0"}, "scans": {}}')
    assert [c.name for c in images_in(tmp_path)] == ["a", "b"]


def test_a_run_in_the_folder_of_a_data_set_is_no_part_of_it(tmp_path: Path) -> None:
    image(tmp_path / "a.nii.gz")
    label(tmp_path / "a_seg.nii.gz")
    label(tmp_path / "runs" / "f0" / "validation" / "a.nii.gz")
    assert open_dataset(tmp_path).problems
    for name in ("settings.json", "splits.json"):
        (tmp_path / "runs" / "f0" / name).write_text("{}")
    assert not open_dataset(tmp_path).problems
    assert len(images_in(tmp_path)) == 1
    assert len(images_in(tmp_path / "runs" / "f0" / "validation")) == 1


def test_results_of_ours_hold_classes(tmp_path: Path) -> None:
    for case in ("a", "b"):
        image(tmp_path / "images" / f"{case}.nii.gz")
        label(tmp_path / "labels" / f"{case}.nii.gz", (0, 255))
    image(tmp_path / "images" / "c.nii.gz")
    drawn = LabelMap(np.ones(SHAPE, np.uint8), np.eye(4), origin=f"{MARK} 0123")
    write_labels(drawn, tmp_path / "labels" / "c.nii.gz")
    data = open_dataset(tmp_path)
    assert (dict(data.label_names), data.label_map) == ({0: "background", 1: "label 255"}, {255: 1})
    assert [set(np.unique(data.labels(c).data)) for c in data.cases] == [{0, 1}, {0, 1}, {1}]


def test_labels_are_never_taken_for_images(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "d", ("a",), 1)
    (root / "imagesTr" / "a_0000.nii.gz").unlink()
    with pytest.raises(DatasetError, match="no images"):
        images_in(root)


def test_layouts_have_different_names() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)


class TestShared:
    """The reference data."""

    pytestmark = shared

    @pytest.mark.parametrize(
        ("folder", "layout", "cases", "channels", "classes"),
        [
            ("Dataset004_Hippocampus", "nnunet", 220, 1, 3),
            ("Dataset027_ACDC", "nnunet", 40, 1, 4),
            ("brats", "brats", 2, 4, 4),
            ("brats/BraTS2021_00006", "brats2020", 1, 4, 4),
            ("brats/BraTS-GLI-00000-000", "brats2023", 1, 4, 4),
            ("lits", "lits", 1, 1, 3),
            ("decathlon/Task01_BrainTumour_mini", "decathlon", 2, 4, 4),
        ],
    )
    def test_is_understood(self, folder: str, layout: str, cases: int, channels: int, classes: int) -> None:
        data = open_dataset(SHARED / folder)
        assert (data.layout, len(data), data.problems) == (layout, cases, ())
        assert (len(data.channel_names), data.classes) == (channels, classes)
        volume, labels = data.read(data.cases[-1])
        assert volume.channels == channels
        assert 0 < labels.data.max() < classes
        assert images_in(SHARED / folder)[-1].images == data.cases[-1].images

    def test_the_packed_left_atrium_lacks_its_images(self) -> None:
        data = open_dataset(SHARED / "Dataset101_LeftAtrium")
        assert (len(data), len(data.problems), data.problems[0].reason) == (0, 80, "has no image")
