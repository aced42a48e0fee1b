"""Old classifiers in the files of several trainers: right order and count, guesses that are shown, and no code run
from a file."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from tests.attack import tallied
from tests.banks import write_bank
from tools.cli import main
from trainer.compat.bank.bank_info import describe, nearest_pairs, summarise
from trainer.compat.bank.center_bank import BankInfo
from trainer.compat.bank.classifiers import open_classifier
from trainer.compat.bank.matrices import open_arrays, open_rows, read_labels
from trainer.errors import CenterBankError
from trainer.files import checksum
from trainer.head.float8 import HALF, decode, encode
from trainer.run.arcface_start import head_momentum

CLASSES, DIM = 103, 16
ORIGINS = Path(__file__).parents[1] / "models" / "origins"


def weight(classes: int = CLASSES, dim: int = DIM) -> Tensor:
    return torch.randn(classes, dim, generator=torch.Generator().manual_seed(1))


def all_rows(classifier: Any) -> Tensor:
    return torch.cat(
        [classifier.rows.read(i, min(i + 7, len(classifier.rows))) for i in range(0, len(classifier.rows), 7)]
    )


def save_shards(folder: Path, world: int, style: str = "new") -> list[Path]:
    """As arcface_torch saves its head: the first C mod W ranks have one class more."""
    sizes = [CLASSES // world + (rank < CLASSES % world) for rank in range(world)]
    files = []
    for rank, part in enumerate(weight().split(sizes)):
        if style == "old":
            torch.save(part.clone(), folder / f"rank_{rank}_softmax_weight.pt")
            torch.save(torch.zeros_like(part), folder / f"rank_{rank}_softmax_weight_mom.pt")
            files.append(folder / f"rank_{rank}_softmax_weight.pt")
            continue
        if style == "head":
            torch.save({"weight": part.clone()}, folder / f"softmax_fc_gpu_{rank}.pt")
            files.append(folder / f"softmax_fc_gpu_{rank}.pt")
            continue
        backbone = nn.Linear(DIM, DIM)
        optimizer = torch.optim.SGD([nn.Parameter(part.clone())], 0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        checkpoint = {
            "epoch": 3,
            "global_step": 7,
            "state_dict_backbone": backbone.state_dict(),
            "state_dict_softmax_fc": {"weight": part.clone()},
            "state_optimizer": optimizer.state_dict(),
            "state_lr_scheduler": scheduler.state_dict(),
        }
        torch.save(checkpoint, folder / f"checkpoint_gpu_{rank}.pt")
        files.append(folder / f"checkpoint_gpu_{rank}.pt")
    return files


@pytest.mark.parametrize("style", ["new", "old", "head"])
@pytest.mark.parametrize("world", [1, 2, 3, 8, 12])
def test_rank_files_come_back_bit_for_bit_in_rank_order(tmp_path: Path, style: str, world: int) -> None:
    files = save_shards(tmp_path, world, style)
    for given in ([tmp_path], sorted(files, key=str), files[::-1]):
        classifier = open_classifier(given, ranks=1 if world == 1 else None)
        assert torch.equal(all_rows(classifier), weight())
    assert f"{CLASSES} classes of dimension {DIM}" in classifier.found


def test_a_missing_or_repeated_rank_is_named(tmp_path: Path) -> None:
    files = save_shards(tmp_path, 4)
    with pytest.raises(CenterBankError, match="rank 2 is missing"):
        open_classifier([files[0], files[1], files[3]])
    with pytest.raises(CenterBankError, match="rank 3 of 4 is missing"):
        open_classifier(files[:3], num_classes=CLASSES)
    (tmp_path / "copy").mkdir()
    again = tmp_path / "copy" / "checkpoint_gpu_01.pt"
    again.write_bytes(files[1].read_bytes())
    with pytest.raises(CenterBankError, match="rank 1 is given twice"):
        open_classifier([*files, again])
    torch.save({"state_dict_softmax_fc": {"weight": weight(40)}}, files[2])
    with pytest.raises(CenterBankError, match="no split of one head"):
        open_classifier(files)
    with pytest.raises(CenterBankError, match="together, expected are 50"):
        open_classifier(save_shards(tmp_path, 4), num_classes=50)


def test_the_classes_of_one_rank_are_not_taken_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "whole").mkdir()
    files = save_shards(tmp_path / "whole", 4)
    alone = tmp_path / "alone" / files[0].name
    alone.parent.mkdir()
    alone.write_bytes(files[0].read_bytes())
    for given in (alone, alone.parent):
        command = ["centers", "from-classifier", str(given), str(tmp_path / "bank")]
        assert main(command) == 2
        assert "does not say how many ranks there were" in capsys.readouterr().err
        assert main([*command, "--ranks", "4"]) == 2
        assert "the files of 1 ranks, --ranks says 4; name all of them" in capsys.readouterr().err
        assert main([*command, "--old-classes", str(CLASSES)]) == 2
        assert "the file of rank 1, 2, 3 of 4 is missing" in capsys.readouterr().err
        assert not (tmp_path / "bank").exists()
    for given in (files[:1], files[:2]):
        with pytest.raises(CenterBankError, match=r"a file of another rank next to the \d given"):
            open_classifier(given)
    assert len(open_classifier(files[:1], ranks=1).rows) == len(open_classifier([alone], ranks=1).rows) < CLASSES
    assert len(open_classifier(files, ranks=4).rows) == CLASSES


def test_files_that_arcface_torchs_own_code_wrote() -> None:
    classifier = open_classifier([ORIGINS / "arcface_torch"])
    parts = [torch.load(ORIGINS / f"arcface_torch/checkpoint_gpu_{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(all_rows(classifier), torch.cat([part["state_dict_softmax_fc"]["weight"] for part in parts]))
    momentum = head_momentum(ORIGINS / "arcface_torch")
    assert momentum is not None
    assert momentum.read(0, 24).abs().min() > 0


def test_cvlfaces_classifiers_of_its_ranks_without_their_padding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its PartialFC of 24 classes on 5 ranks has 25 rows; its FC is saved by rank 0, whole."""
    folder = ORIGINS / "cvlface" / "partial_fc"
    files = [folder / f"classifier_rank{rank}.pt" for rank in range(5)]
    rows = torch.cat([torch.load(file, weights_only=True)["partial_fc.weight"] for file in files])
    assert len(rows) == 25
    for given in ([folder], files[::-1]):
        assert torch.equal(all_rows(open_classifier(given, num_classes=24)), rows[:24])
    assert main(["centers", "from-classifier", str(folder), str(tmp_path / "bank")]) == 0
    assert "up to 4 of the last may be no class, which --old-classes settles" in capsys.readouterr().err
    assert len(open_classifier([folder], ranks=5).rows) == 25
    with pytest.raises(CenterBankError, match="rank 4 of 5 is missing"):
        open_classifier(files[:4], num_classes=24)
    with pytest.raises(CenterBankError, match=r"classifier_rank1.pt: a file of another rank next to the 1 given"):
        open_classifier(files[:1])
    with pytest.raises(CenterBankError, match="together, expected are 20"):
        open_classifier([folder], num_classes=20)
    whole = ORIGINS / "cvlface" / "fc" / "classifier_rank0.pt"
    for one in (whole, whole.parent):
        assert len(open_classifier([one], num_classes=24).rows) == 24


@pytest.mark.parametrize("world", [2, 4, 7])
def test_more_padding_than_one_rank_has(tmp_path: Path, world: int) -> None:
    """CVLface gives 9 classes 5 + 5, 3 + 3 + 3 + 3 and 7 times 2 rows."""
    rows = weight(-(-9 // world) * world)
    for rank, part in enumerate(rows.split(len(rows) // world)):
        torch.save({"partial_fc.weight": part.clone()}, tmp_path / f"classifier_rank{rank}.pt")
    assert torch.equal(all_rows(open_classifier([tmp_path], num_classes=9)), rows[:9])


def test_files_of_the_current_folder_are_named_by_its_full_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [file.name for file in save_shards(tmp_path, 2)]
    monkeypatch.chdir(tmp_path)
    assert main(["centers", "from-classifier", *names, "bank"]) == 0
    said = "".join(capsys.readouterr())
    assert f"{tmp_path}: 'state_dict_softmax_fc.weight' of 2 ranks" in said
    assert ".: " not in said
    assert main(["centers", "from-classifier", names[1], "other"]) == 2
    assert f"{tmp_path}: the file of rank 0 is missing" in capsys.readouterr().err


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["pt", "safetensors", "npy", "npz", "npz-compressed"])
def test_single_files_in_both_layouts(tmp_path: Path, kind: str, transposed: bool) -> None:
    matrix = weight(900, 64)
    stored = matrix.T.contiguous() if transposed else matrix
    path = tmp_path / f"head.{kind.split('-')[0]}"
    if kind == "pt":
        torch.save({"state_dict": {"module.fc.weight": stored, "module.conv.weight": torch.zeros(8, 8)}}, path)
    elif kind == "safetensors":
        save_file({"head.kernel": stored, "features.weight": torch.zeros(8, 8)}, path)
    elif kind == "npy":
        np.save(path, stored.numpy())
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(path, weight=stored.numpy(), labels=np.arange(3))
    classifier = open_classifier([path])
    assert torch.equal(all_rows(classifier), matrix)
    assert ("dimension × classes" in classifier.found) == transposed
    assert torch.equal(all_rows(open_classifier([path], num_classes=900)), matrix)
    with pytest.raises(CenterBankError, match="901"):
        open_classifier([path], num_classes=901)


def test_unclear_files_are_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    save_file({"head.weight": weight(30, 64), "fc.weight": weight(40, 64)}, path)
    with pytest.raises(
        CenterBankError, match=r"its `key`, or a file that holds it alone; it has .*head.weight \(30, 64\)"
    ):
        open_classifier([path])
    assert len(open_classifier([path], num_classes=30).rows) == 30
    assert len(open_classifier([path], key="fc.weight").rows) == 40
    with pytest.raises(CenterBankError, match=r"has no matrix with 50 classes; it has .*head.weight \(30, 64\)"):
        open_classifier([path], num_classes=50)
    with pytest.raises(CenterBankError, match="no matrix 'nothing'"):
        open_classifier([path], key="nothing")
    save_file({"weight": weight(60, 70)}, path)
    with pytest.raises(CenterBankError, match="give `layout`"):
        open_classifier([path])
    assert open_classifier([path], layout="columns").rows.dim == 60
    save_file({"weight": weight(100, 512)}, path)
    assert len(open_classifier([path]).rows) == 100, "512 is a usual dimension, 100 is none"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"weight": weight(300, 64).to(dtype)}, tmp_path / "w.safetensors")
    assert torch.equal(all_rows(open_classifier([tmp_path / "w.safetensors"])), weight(300, 64).to(dtype).float())


class Hostile:
    """Unpickling it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
@tallied("hostile files: pickles", "refused")
def test_hostile_pickles_do_not_run(tmp_path: Path, legacy: bool) -> None:
    path, target = tmp_path / "checkpoint_gpu_0.pt", tmp_path / "written"
    torch.save(
        {"state_dict_softmax_fc": {"weight": weight()}, "extra": Hostile(target)},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(CenterBankError, match="nothing of it was executed"):
        open_classifier([path], ranks=1)
    assert not target.exists()
    objects = np.array([Hostile(target)], dtype=object)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "x.npz", weight=objects)
    for file in ("x.npy", "x.npz"):
        with pytest.raises(CenterBankError, match="cannot be read"):
            open_arrays(tmp_path / file)
        assert not target.exists()
    with pytest.raises(CenterBankError):
        read_labels(tmp_path / "x.npy")
    torch.load(path, weights_only=False)
    assert target.exists(), "the control: an unrestrained unpickler does run it"


def test_files_of_before_the_zip_format_are_read(tmp_path: Path) -> None:
    torch.save({"weight": weight(300, 64)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(all_rows(open_classifier([tmp_path / "old.pt"])), weight(300, 64))


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"nothing")
    (tmp_path / "a.txt").write_text("1 2 3")
    (tmp_path / "a.safetensors").write_bytes(b"x" * 40)
    (tmp_path / "a.npz").write_bytes(b"x" * 40)
    for name, reason in (
        ("a.npy", "is no array of numpy"),
        ("a.npz", "is no archive of numpy arrays"),
        ("a.safetensors", "is no safetensors file"),
        ("a.txt", "unknown kind"),
        ("absent.npy", "no such file"),
    ):
        with pytest.raises(CenterBankError, match=f"{name}: {reason}"):
            open_arrays(tmp_path / name)
    with pytest.raises(CenterBankError, match="holds no checkpoint_gpu"):
        open_classifier([tmp_path])
    np.save(tmp_path / "ints.npy", np.arange(6).reshape(2, 3))
    with pytest.raises(CenterBankError, match="not rows of vectors"):
        open_rows([tmp_path / "ints.npy"])


def test_our_own_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000007"
    state = {"task.rows": weight(), "task.momentum": torch.zeros(CLASSES, DIM), "backbone.w": torch.ones(4, 4)}
    save_distributed(state, checkpoint_id=folder, no_dist=True)
    files = {p.name: list(checksum(p)) for p in folder.iterdir()}
    (folder / "state.json").write_text(json.dumps({"format": 1, "step": 7, "files": files}))
    for given in (tmp_path, folder):
        classifier = open_classifier([given])
        assert torch.equal(all_rows(classifier), weight())
    data = max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CenterBankError, match="content changed"):
        open_classifier([folder])


def test_rows_in_float8_are_read_with_their_scales(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000007"
    codes, scale = encode(weight(), torch.full((), HALF))
    save_distributed({"task.rows_float8": codes, "task.rows_scale": scale}, checkpoint_id=folder, no_dist=True)
    files = {p.name: list(checksum(p)) for p in folder.iterdir()}
    (folder / "state.json").write_text(json.dumps({"format": 1, "step": 7, "files": files}))
    rows = open_classifier([tmp_path]).rows
    assert torch.equal(rows.read(0, len(rows)), decode(codes, scale))
    some = np.array([7, 3])
    assert torch.equal(rows.take(some), decode(codes, scale)[some])


def test_info_finds_duplicates_and_odd_boundaries(tmp_path: Path) -> None:
    centers = nn.functional.normalize(weight())
    centers[70] = nn.functional.normalize(centers[11] + 0.02 * centers[12], dim=0)
    centers[5] = centers[90]
    mask = torch.ones(CLASSES, dtype=torch.bool)
    mask[90] = False
    boundaries = torch.full((CLASSES,), 0.6)
    boundaries[[3, 8]] = torch.tensor([-0.2, -1.0])
    counts = torch.full((CLASSES,), 4)
    counts[20] = 1
    bank = write_bank(
        tmp_path / "bank", centers=centers, boundaries=boundaries, counts=counts, mask=mask, info=BankInfo()
    )
    figures = {**summarise(bank), "nearest_pairs": nearest_pairs(bank, 4)}
    assert figures["nearest_pairs"][0]["classes"] == [11, 70], "and not 5 with the masked 90"
    products = centers @ centers.T
    products[~mask] = products[:, ~mask] = -2
    expected = products.triu(1).flatten().topk(4).values.tolist()
    assert [pair["cosine"] for pair in figures["nearest_pairs"]] == pytest.approx(expected, abs=1e-5)
    assert (figures["masked"], figures["single_image"], figures["unrestrained"]) == (1, 1, 1)
    assert figures["meaningless"]["examples"] == [3]
    text = describe(tmp_path / "bank", figures)
    assert "11 – 70" in text
    assert "classes 3" in text


def test_sampled_pairs_compare_the_sample_with_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    centers = nn.functional.normalize(weight())
    bank = write_bank(
        tmp_path / "bank",
        centers=centers,
        boundaries=torch.zeros(CLASSES),
        counts=torch.ones(CLASSES),
        mask=torch.ones(CLASSES, dtype=torch.bool),
        info=BankInfo(),
    )
    monkeypatch.setattr("trainer.compat.bank.bank_info.EXACT_CLASSES", 50)
    monkeypatch.setattr("trainer.compat.bank.bank_info.SAMPLE_PRODUCTS", 20 * CLASSES)
    sample = np.sort(np.random.default_rng(0).choice(CLASSES, 20, replace=False))
    products = centers @ centers.T
    products.fill_diagonal_(-2)
    best = nearest_pairs(bank, 1)[0]
    assert best["cosine"] == pytest.approx(float(products[sample].max()), abs=1e-5)
