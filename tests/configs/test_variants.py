"""Keys that would do nothing, or cannot hold, are refused; a later layer that chooses another variant replaces the
former one's keys."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.errors import ConfigError
from trainer.head.config import ArcFaceConfig
from trainer.run.config import Config, dump_config, load_config, parse_config

BASE: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "data": {"loader": "synthetic"},
}
CROSS = ["data.loader=torch", "data.path=d", "compat.method=lce", "compat.mode=cross-model", "compat.new_embeddings=n"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("head.margin.upper_norm=90", "head.margin.upper_norm belongs to magface; head.margin.name is cosface"),
        ("head.margin.m1=1.1", "head.margin.m1 belongs to combined; head.margin.name is cosface"),
        ("head.margin.name=combined head.margin.m=0.5", "head.margin.m belongs to cosface, arcface, adaface and"),
        ("head.optimizer.beta1=0.8", "head.optimizer.beta1 belongs to adamw; head.optimizer.name is sgd"),
        ("optimizer.name=adamw optimizer.momentum=0.9", "optimizer.momentum belongs to sgd; optimizer.name is adamw"),
        ("optimizer.name=adamw optimizer.start_momentum=true", "optimizer.start_momentum belongs to sgd"),
        ("optimizer.start_momentum=true", "optimizer.start_momentum: no weights that hold one"),
        ("schedule.name=cosine schedule.gamma=0.5", "schedule.gamma belongs to step; schedule.name is cosine"),
        ("schedule.name=cosine schedule.power=1", "schedule.power belongs to polynomial; schedule.name is cosine"),
        ("schedule.name=step schedule.milestones=[0.9,0.5,7]", "schedule.milestones = .*ascending shares"),
        ("optimizer.lr=.inf", "optimizer.lr = .*finite number"),
        ("train.ema=.nan", "train.ema = "),
        ("run.seed=9223372036854775808", "run.seed = .*less than"),
        ("compat.method=lce compat.bank=b compat.alignment_weight=0 compat.boundary_weight=0", "an incompatible model"),
        ("compat.method=bct compat.bank=b compat.weight=0", "compat.weight: 0 trains an incompatible model"),
        ("train.steps=9 train.epochs=2", "train.epochs has no effect with train.steps"),
        ("head.impl=reference head.sub_centers=2", "head.impl = reference: without sub-centres"),
        ("head.impl=reference head.optimizer.name=adamw head.sample_rate=0.5", "adamw at sample_rate 1 only"),
        ("head.impl=reference head.rows=bfloat16", "needs stochastic rounding"),
        ("head.sampling_correction=true", "head.sampling_correction: weights drawn negatives"),
        (
            "head.impl=reference head.chunk_rows=9",
            "head.chunk_rows belongs to passes in chunks; head.impl is reference",
        ),
        (
            "compat.method=lce compat.bank=b compat.mix_share=0.2",
            "compat.mix_share belongs to mixbct; compat",
        ),
        (
            "compat.method=lce compat.bank=b compat.old_margin=1",
            "old_margin belongs to bct, unibct, ndpp and bt2",
        ),
        ("compat.method=lce compat.bank=b compat.maps=t21", "compat.maps belongs to lce/cross-model; compat.mode is d"),
        (
            "compat.method=lce compat.bank=b compat.transform.name=mlp",
            "compat.transform belongs to lce/backward, lce/forward, lce/both, lce/cross-model and fct; compat.mode is",
        ),
        ("evaluate.sets={a: a.bin}", "evaluate.sets: never measured with evaluate.every_steps=0"),
        ("evaluate.old=m", "evaluate.old: nothing is measured without evaluate.sets"),
        ("evaluate.every_steps=5", "nothing is measured without evaluate.sets"),
        (" ".join([*CROSS, "head.sample_rate=0.5"]), "head.sample_rate belongs to runs that train a network"),
        (
            " ".join([*CROSS, "compat.new_bank=b compat.contrastive_weight=1"]),
            "compat.contrastive_weight: of the two embeddings of each image, .* put compat.contrastive_weight=0 over",
        ),
        (
            " ".join([*CROSS, "compat.new_bank=b compat.distance=true"]),
            "compat.distance: of the two embeddings of each .* put compat.distance=false over",
        ),
        (
            " ".join([*CROSS, "compat.new_bank=b compat.noise=0.5 compat.contrastive_weight=1"]),
            "compat.contrastive_weight, compat.noise: of .* put compat.contrastive_weight=0 compat.noise=0 over a file",
        ),
        (" ".join([*CROSS, "compat.maps=t21 compat.distance=true"]), "compat.distance: is of T₁₂"),
        (" ".join([*CROSS, "compat.orthogonal_weight=1"]), "of a linear T₂₁; compat.maps is both, .*name rbt: set"),
        (
            " ".join([*CROSS, "compat.orthogonal_weight=1 compat.maps=t12 compat.transform.name=linear"]),
            "of a linear T₂₁; compat.maps is t12",
        ),
        (" ".join([*CROSS, "compat.orthogonal_threshold=2"]), "no effect with compat.orthogonal_weight = 0"),
        (" ".join([*CROSS, "compat.contrastive_temperature=2"]), "no effect with compat.contrastive_weight = 0"),
        (" ".join([*CROSS, "backbone.dim=64"]), "backbone.dim belongs to runs that train a network"),
        ("compat.bank=/does/not/exist compat.mode=both", "compat.bank belongs to lce, bct, .*; compat.method is none"),
        ("compat.method=bct compat.bank=b compat.mode=both", "compat.mode belongs to lce; compat.method is bct"),
        ("compat.method=mixbct compat.weight=2", "compat.weight belongs to .*; compat.method is mixbct"),
        ("data.workers=3", "data.workers belongs to auto, dali and torch; data.loader is synthetic"),
        ("head.margin.name=magface head.margin.upper_norm=5", "lower_norm < upper_norm"),
        ("head.margin.name=arcfase", "head.margin.name = 'arcfase': unknown; did you mean arcface"),
        ("head.sample_rate=0.5 head.optimizer.weight_decay=6 schedule.warmup=0.5", "above 0.5"),
        ("optimizer.lr=yes", "optimizer.lr = True: expected a number"),
        ("train.steps=true", "train.steps = True: expected a number"),
        ("optimizer.name=adamw optimizer.betas=[true,0.9]", "optimizer.betas = .*expected a number"),
        ("evaluate.far=0.01", "evaluate.far = 0.01: has no effect without a labelled set"),
        ("evaluate.max_images=50", "evaluate.max_images = 50: has no effect without a labelled set"),
        ("train.steps=5 log.profile=[6,7]", "log.profile = .*the run ends after 5 updates"),
        ("checkpoint.every_steps=0 checkpoint.keep_every=9", "checkpoint.keep_every = 9: has no effect"),
        ("checkpoint.every_steps=10 checkpoint.keep_every=15", "checkpoint.keep_every = 15: no multiple"),
        ("head.margin.inter_class_filter=1", "head.margin.inter_class_filter = 1: must be less than 1"),
        ("schedule.name=step schedule.milestones=[]", "schedule.milestones = .*at least one"),
        ("schedule.name=step schedule.warmup=0.5", "schedule.milestones: the first, 0.5, is not behind"),
        ("schedule.name=step schedule.gamma=1", "schedule.gamma = 1: must be less than 1"),
        (
            "log.progress=false log.line_seconds=5",
            "5.0: has no effect with .*; remove it, or put log.line_seconds=30.0 over",
        ),
        ("train.steps=ten", "train.steps = 'ten': expected a whole number"),
        ("optimizer.lr=high", "optimizer.lr = 'high': expected a number"),
        ("log.tensorboard=false log.images=false", "log.images = false: has no effect without"),
        ("head.impl=reference head.update=deferred", "head.update = deferred: has no effect"),
        ("head.weights=w head.init_std=0.5", "head.init_std = 0.5: has no effect with head.weights"),
        ("optimizer.momentum=0 optimizer.start_momentum=true backbone.weights=w", "optimizer.start_momentum = true"),
        (" ".join([*CROSS, "compat.transform.name=mlp", "train.compile=true"]), "train.compile = true: .* is not rbt"),
        ("head.margin.name=arcface head.margin.m=3.2", "head.margin.m = 3.2: must be less than 3.14"),
        ("head.margin.m=2", "head.margin.m = 2: must be less than 2"),
        ("data.synthetic_classes=1", "data.synthetic_classes = 1: must be greater"),
        ("optimizer.name=adamw optimizer.weight_decay=11", "optimizer.weight_decay = 11: times the highest"),
        ("head.optimizer.weight_decay=11", "head.optimizer.weight_decay = 11: times the highest"),
        ("head.margin.scale=79", "head.margin.scale = 79.0: the fused pass is exact in float32 up to 78"),
        ("compat.method=lce compat.bank=b head.sub_centers=2", "compat.mode = direct with head.sub_centers = 2"),
        ("run.threads=5000", "run.threads = 5000: must be less than or equal to 1024"),
        ("run.dir=", "run.dir is empty: expected a path"),
        ("compat=[{method: bct, bank: a},{method: lce, bank: b}]", "all methods must be for one old model"),
        ("compat=[{method: bct, bank: a, mode: both},{method: lce}]", "compat.0.mode belongs to lce"),
        ("compat.method=mixbct compat.bank=b compat.old_embeddings=e compat.mix_share=0", "an incompatible model"),
        (
            "compat.method=lce compat.bank=b compat.boundary_weight=0 compat.authors_formula=true",
            "authors_formula = true: has no effect in mode direct",
        ),
        (" ".join([*CROSS, "compat.old_embeddings=e", "compat.old_model=m"]), "both are given"),
        (
            " ".join([*CROSS, "compat.bank=b", "compat.new_bank=c", "compat.old_embeddings=e"]),
            "compat.old_embeddings = e: has no effect with compat.new_bank",
        ),
        (
            " ".join([*CROSS, "compat.old_embeddings=e", "compat.boundary_weight=5"]),
            "compat.boundary_weight = 5.0: has no effect without compat.bank",
        ),
        (" ".join([*CROSS, "compat.old_model=m", "compat.alignment_weight=0"]), "trains nothing without compat.bank"),
        (" ".join([*CROSS, "optimizer.start_momentum=true"]), "start_momentum = true: has no effect where no network"),
        (" ".join([*CROSS, "evaluate.every_steps=5", "evaluate.sets.a=a"]), "trains no network that embeds images"),
        ("head.margin.name=combined", "combined with m1 = 1, m2 = 0 and m3 = 0 is no margin"),
        ("head.rows=float64 head.compute=tf32", "head.compute = tf32: rounds products of float32; head.rows is"),
        (
            "train.precision=float64 train.matmul=tf32",
            "train.matmul = tf32: has no effect with train.precision=float64",
        ),
    ],
)
def test_a_key_without_effect_is_refused(words: str, reason: str, file: Path) -> None:
    given = words.split() if "{" not in words else [words]
    with pytest.raises(ConfigError, match=reason) as error:
        load_config(file, given)
    assert "\n" not in str(error.value)


def test_the_control_is_accepted(file: Path) -> None:
    """Each of those keys with the variant that has it."""
    words = ["head.margin.name=magface", "head.margin.upper_norm=90", "head.optimizer.name=adamw", "train.epochs=2"]
    words += ["head.optimizer.beta1=0.8", "schedule.name=step", "schedule.milestones=[0.5,0.9]", "compat.method=lce"]
    words += ["compat.bank=b", "compat.mode=both", "compat.transform.name=mlp", "head.sample_rate=0.5"]
    words += ["head.sampling_correction=true", "head.optimizer.weight_decay=6"]
    config = load_config(file, words)
    assert config.label == "both"
    assert load_config(file, CROSS).label == "cross-model"


@pytest.mark.parametrize(
    "given", ["compat.new_bank=c compat.contrastive_weight=0 compat.noise=0", "compat.old_model=m"]
)
def test_what_is_aligned_replaces_what_the_recipe_aligns(given: str) -> None:
    method = load_config("configs/cross-model.yaml", given.split()).methods[0]
    assert method.model_dump()["old_embeddings"] is None
    assert method.model_dump()[given.partition("=")[0].removeprefix("compat.")] is not None


def merged(tmp_path: Path, *layers: dict[str, Any], words: tuple[str, ...] = ()) -> Config:
    names = []
    for number, layer in enumerate((BASE, *layers)):
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(layer))
        names.append(str(tmp_path / f"{number}.yaml"))
    return load_config(names[0], [*names[1:], *words])


def test_keys_of_the_former_variant_fall(tmp_path: Path) -> None:
    magface = {"head": {"margin": {"name": "magface", "upper_norm": 90, "scale": 32}}}
    arcface = {"head": {"margin": {"name": "arcface", "m": 0.5}}}
    config = merged(tmp_path, magface, arcface)
    assert config.head.margin == ArcFaceConfig(scale=32, m=0.5)
    assert "upper_norm" not in dump_config(config)
    back = merged(tmp_path, magface, arcface, words=("head.margin.name=magface",))
    assert back.head.margin.upper_norm == 110  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"1.yaml: head.margin.upper_norm belongs to magface"):
        merged(tmp_path, {"head": {"margin": {"upper_norm": 90}}}, words=("head.margin.name=arcface",))
    late = merged(tmp_path, {"head": {"margin": {"upper_norm": 90}}}, words=("head.margin.name=magface",))
    assert late.head.margin.upper_norm == 90  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"2.yaml: head.margin.upper_norm belongs to magface"):
        merged(tmp_path, arcface, {"head": {"margin": {"upper_norm": 90}}})


def test_a_key_of_the_same_name_in_another_variant_falls_too(tmp_path: Path) -> None:
    cosface = {"head": {"margin": {"name": "cosface", "m": 0.2, "scale": 32}}}
    margin = merged(tmp_path, cosface, words=("head.margin.name=arcface",)).head.margin
    assert margin == ArcFaceConfig(scale=32)
    lce = {"compat": {"method": "lce", "bank": "b", "boundary_weight": 10.0}}
    (adv,) = merged(tmp_path, lce, words=("compat.method=advbct", "compat.old_model=o")).methods
    assert (adv.bank, adv.boundary_weight) == (Path("b"), 1.0)  # type: ignore[attr-defined]
    rates = merged(tmp_path, {"optimizer": {"lr": 0.01}}, words=("optimizer.name=adamw",)).optimizer
    assert (rates.name, rates.lr) == ("adamw", 0.01)


def test_a_rule_over_several_keys_names_where_the_last_of_them_was_given(file: Path) -> None:
    file.write_text(yaml.safe_dump(BASE | {"head": {"sampling_correction": True, "sample_rate": 0.5}}))
    with pytest.raises(ConfigError, match=r"^command line: head\.sampling_correction"):
        load_config(file, ["head.sample_rate=1", "run.seed=3"])
    file.write_text(yaml.safe_dump(BASE | {"head": {"sampling_correction": True, "sample_rate": 1}}))
    with pytest.raises(ConfigError, match=r"^\S*run\.yaml: head\.sampling_correction"):
        load_config(file, ["run.seed=3"])


def test_a_text_in_place_of_a_list_of_overrides_is_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"`overrides` = 'run\.seed=3': expected a list"):
        load_config(file, "run.seed=3")


def test_a_path_without_a_space_behind_its_name_is_explained(file: Path) -> None:
    with pytest.raises(ConfigError, match="YAML takes a colon with a space behind it: a: /nope"):
        load_config(file, ["evaluate.sets={a:/nope}", "evaluate.every_steps=5"])


def test_an_empty_file_is_told_which_keys_it_needs(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(ConfigError, match=r"run is missing and has no default; give run\.dir") as error:
        load_config(tmp_path / "empty.yaml")
    assert "data is missing and has no default; give data.path" in str(error.value)


def test_methods_and_lengths_replace_each_other(tmp_path: Path) -> None:
    lce = {"compat": {"method": "lce", "mode": "both", "bank": "b", "transform": {"name": "mlp", "hidden": 9}}}
    config = merged(tmp_path, lce, {"compat": {"method": "bct"}})
    assert config.compat == (type(config.compat[0])(method="bct", bank="b"),)
    assert merged(tmp_path, lce, words=("compat.method=none",)).compat == ()
    direct = merged(tmp_path, lce, words=("compat.mode=direct",))
    assert direct.label == "direct"
    linear = merged(tmp_path, lce, words=("compat.transform.name=linear",))
    assert "hidden" not in dump_config(linear)
    assert merged(tmp_path, {"train": {"epochs": 9}}, words=("train.steps=5",)).train.steps == 5
    longer = merged(tmp_path, {"train": {"steps": 9}}, words=("train.epochs=5",)).train
    assert (longer.steps, longer.epochs) == (None, 5)


def test_one_method_may_stand_in_a_list(tmp_path: Path) -> None:
    lce = {"method": "lce", "bank": "b"}
    one, same = merged(tmp_path, {"compat": [lce]}), merged(tmp_path, {"compat": lce})
    assert one == same
    assert dump_config(one) == dump_config(same)
    assert merged(tmp_path, {"compat": [lce]}, words=("compat.bank=c",)).methods[0].bank == Path("c")
    assert merged(tmp_path, {"compat": []}).compat == ()


def test_what_is_dumped_is_read_back(tmp_path: Path) -> None:
    for words in ([], ["train.steps=3"], ["compat.method=fct", "compat.old_model=o"], CROSS):
        config = parse_config(BASE, "test", words)
        (tmp_path / "dumped.yaml").write_text(dump_config(config))
        again = load_config(tmp_path / "dumped.yaml")
        assert again == config
        assert dump_config(again) == dump_config(config)
