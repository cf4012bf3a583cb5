"""Settings: recipes, presets, files and single changes, and what is refused."""

import json
from pathlib import Path

import pytest

from ossnet.errors import SettingsError
from ossnet.training.settings import PRESETS, UNUSED, describe_settings, make_settings, unused


def test_the_defaults_of_the_papers_variants_are_the_papers() -> None:
    settings = make_settings("C")
    assert settings.sampling.locations == 2**14
    assert (settings.optimiser.lr, settings.optimiser.pade_lr) == (3e-4, 1e-2)
    assert (settings.optimiser.lookahead_k, settings.optimiser.lookahead_alpha) == (5, 0.8)
    assert (settings.schedule.epochs, settings.schedule.milestones) == (50, (20, 30))
    assert settings.schedule.batch_size == 8
    assert settings.validation.locations == 2**17
    assert settings.loss.aux == 0.1


def test_presets_are_the_papers_experiments() -> None:
    brats, lits = make_settings(preset="brats2020"), make_settings(preset="lits")
    assert brats.data.shape == (256, 256, 160)
    assert brats.sampling.strategy == "uniform"
    assert lits.data.shape == (512, 512, 512)
    assert lits.sampling.strategy == "border"
    assert lits.schedule.batch_size == 4
    assert {s.data.orientation for s in (brats, lits)} == {"file"}


@pytest.mark.parametrize("name", ["o-net", "O_NET", "onet", "c", "multiscale", "UNet3D"])
def test_variants_are_known_in_any_spelling(name: str) -> None:
    assert make_settings(name).variant in ("O-Net", "C", "multiscale", "unet3d")


def test_later_ones_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[schedule]\nepochs = 7\nbatch_size = 3\n")
    settings = make_settings("B", "lits", file, ["schedule.epochs=9", "data.shape=64,64,32"])
    assert settings.variant == "B"
    assert (settings.schedule.epochs, settings.schedule.batch_size) == (9, 3)
    assert settings.data.shape == (64, 64, 32)
    other = tmp_path / "mine.json"
    other.write_text(json.dumps({"variant": "A", "optimiser": {"pade_lr": "released"}}))
    assert make_settings(config=other).optimiser.pade_lr == "released"


def test_settings_that_a_variant_does_not_heed_are_refused_and_not_listed() -> None:
    with pytest.raises(SettingsError, match=r"augmentation\.noise: variant multiscale does not use it"):
        make_settings(changes=["augmentation.noise=0"])
    assert make_settings("C", changes=["augmentation.noise=0"]).augmentation.noise == 0
    band = "sampling.border_width_mm=4"
    with pytest.raises(SettingsError, match=r"border_width_mm: variant multiscale does not use it"):
        make_settings(changes=[band])
    assert make_settings(changes=[band, "validation.scheme=released_lits"]).sampling.border_width_mm == 4
    assert make_settings("C", changes=[band]).sampling.border_width_mm == 4
    with pytest.raises(SettingsError, match=r"validation\.locations: variant C does not use it"):
        make_settings("C", changes=["validation.scheme=released_lits", "validation.locations=1000"])
    listed = {key for key, _, _ in describe_settings("multiscale")}
    assert "augmentation.noise" not in listed
    assert "augmentation.intensity" in listed
    every = {key for key, _, _ in describe_settings()}
    for variant in (*UNUSED, "C", "O-Net"):
        left_out = unused(variant, scheme=make_settings(variant).validation.scheme)
        assert every - {key for key, _, _ in describe_settings(variant)} == left_out, variant
    with pytest.raises(SettingsError, match=r"loss\.kind: variant C does not use it"):
        make_settings("c", changes=["loss.kind=dice"])


def test_files_may_not_hold_what_a_variant_does_not_heed(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"network": {"blocks": [4, 8]}}))
    with pytest.raises(
        SettingsError, match=r"mine\.json: network\.blocks: variant multiscale does not use it"
    ):
        make_settings(config=file)
    # The settings of a run name all, with the values that they have anyway.
    for variant in (*UNUSED, "C"):
        file.write_text(make_settings(variant).model_dump_json())
        assert make_settings(config=file) == make_settings(variant)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("unet2d", ["data.spacing=3,3,3"]),
        ("unet3d", ["data.spacing=3,3,3"]),
        ("unet3d", ["data.shape=32,32,32", "network.patch_shape=16,16,16"]),
        ("unet3d", ["augmentation.grows=3"]),
    ],
)
def test_on_patches_others_count_than_on_whole_volumes(variant: str, changes: list[str]) -> None:
    with pytest.raises(SettingsError, match=f"{changes[0].split('=')[0]}: variant {variant} does not use it"):
        make_settings(variant, changes=changes)


def test_none_is_a_word_where_it_is_one_of_the_values() -> None:
    assert make_settings(changes=["data.normalise=none"]).data.normalise == "none"
    assert make_settings("C", changes=["data.fit=None", "data.shape=none"]).data.fit == "none"
    assert make_settings(changes=["schedule.minutes=none"]).schedule.minutes is None


def test_presets_of_the_papers_baselines() -> None:
    """SPEC §3 "Baselines"."""
    deep, flat = make_settings("unet3d", "lits"), make_settings("unet2d", "lits")
    assert (deep.data.shape, deep.schedule.batch_size) == ((224, 224, 224), 2)
    assert (flat.data.shape, flat.schedule.batch_size) == ((512, 512, 512), 12)
    assert make_settings("unet2d", "brats2020").schedule.batch_size == 32
    # Judged as the paper's networks are.
    for preset in ("brats2020", "lits"):
        assert deep.validation == make_settings("C", preset).validation
        assert make_settings("unet3d", preset).validation == make_settings("unet2d", preset).validation
    assert (deep.validation.locations, deep.validation.scheme) == (2**17, "uniform")
    assert make_settings("unet3d", "lits", changes=["schedule.batch_size=1"]).schedule.batch_size == 1


def test_epochs_are_meant_where_they_are_given(tmp_path: Path) -> None:
    assert make_settings().schedule.minutes == 60
    assert make_settings(changes=["schedule.epochs=20"]).schedule.minutes is None
    assert make_settings(changes=["schedule.epochs=20", "schedule.minutes=5"]).schedule.minutes == 5
    # The settings of a run name both.
    by_minutes, by_epochs = tmp_path / "minutes.json", tmp_path / "epochs.json"
    by_minutes.write_text(make_settings().model_dump_json())
    by_epochs.write_text(make_settings(changes=["schedule.epochs=20"]).model_dump_json())
    assert make_settings(config=by_minutes).schedule.minutes == 60
    assert make_settings(config=by_minutes, changes=["schedule.epochs=20"]).schedule.minutes is None
    assert make_settings(config=by_epochs).schedule.minutes is None
    assert make_settings(config=by_epochs, changes=["schedule.minutes=5"]).schedule.minutes == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("schedule.epoch=5", "schedule.epochs"),
        ("epochs=5", "schedule.epochs"),
        ("schedule.epochs=0", "greater than"),
        ("schedule=3", "group"),
        ("schedule.epochs", "no ="),
        ("optimiser.name=sgd", "lookahead_radam"),
        ("data.cache_gb=inf", "finite"),
        ("optimiser.lr=nan", "finite"),
        ("optimiser.pade_lr=-1", "not an allowed value"),
    ],
)
def test_what_has_no_meaning_is_refused_with_help(change: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_settings("C", changes=[change])


@pytest.mark.parametrize(("name", "text"), [("a.json", "{"), ("a.toml", "= 3"), ("a.json", "[]")])
def test_files_that_hold_no_settings_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError, match=name):
        make_settings(config=tmp_path / name)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SettingsError, match="Choose one of"):
        make_settings("resnet")
    with pytest.raises(SettingsError, match="brats2020"):
        make_settings(preset="brats")


def test_every_setting_is_described() -> None:
    rows = describe_settings()
    assert len(rows) > 50
    assert {"sampling.locations", "schedule.minutes", "runtime.devices"} <= {name for name, _, _ in rows}
    assert PRESETS


def test_the_values_of_a_variant_are_shown() -> None:
    default = {key: value for key, value, _ in describe_settings("multiscale")}
    paper = {key: value for key, value, _ in describe_settings("C")}
    assert (default["optimiser.name"], paper["optimiser.name"]) == ("muon", "lookahead_radam")
    assert (default["augmentation.flip_axes"], paper["augmentation.flip_axes"]) == ("[]", "[0, 1]")
    words = {key: meaning for key, _, meaning in describe_settings()}["optimiser.name"]
    assert words == "one of lookahead_radam, adamw, muon"
    shown = [f"{key}={value}" for key, value in default.items() if "." in key]
    assert make_settings(changes=shown) == make_settings()
