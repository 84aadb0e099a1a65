"""Adapters of a lower rank: nearest ones, with the same scale, and whole where nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shrink
from shrink import CONFIG, WEIGHTS, ShrinkError, nearest

LAYER = "base_model.model.layers.0.q_proj"
TOLERANCE = 1e-5


def adapter(folder: Path, true_rank: int) -> tuple[Path, torch.Tensor]:
    """An adapter of rank 6 and scale 2, whose product has a rank of its own."""
    torch.manual_seed(3)
    a, b = torch.randn(6, 10), torch.randn(8, 6)
    b[:, true_rank:] = 0
    folder.mkdir()
    about = {"masks": 3, "price": {"loss": [3.0, 3.1]}, "odds": {"hazard": [[0.5]]}}
    weights = {f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b, "masks": torch.ones(3)}
    save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"r": 6, "lora_alpha": 12.0, "selfdraft": about}))
    return folder, 2 * b @ a


def product(folder: Path) -> torch.Tensor:
    config, weights = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    a, b = (weights[f"{LAYER}.lora_{side}.weight"] for side in "AB")
    assert len(a) == b.shape[1] == config["r"]
    return config["lora_alpha"] / config["r"] * b @ a


def test_a_product_of_low_rank_is_kept_whole(tmp_path: Path) -> None:
    source, whole = adapter(tmp_path / "one", true_rank=3)
    share = shrink.shrink(source, tmp_path / "out", 3)
    torch.testing.assert_close(product(tmp_path / "out"), whole, rtol=TOLERANCE, atol=TOLERANCE)
    assert share == pytest.approx(1)
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)["masks"], torch.ones(3))
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["selfdraft"] == {"masks": 3}


def test_what_is_lost_is_what_is_said_and_cutting_rows_loses_more(tmp_path: Path) -> None:
    source, whole = adapter(tmp_path / "one", true_rank=6)
    share = shrink.shrink(source, tmp_path / "out", 3)
    lost = (product(tmp_path / "out") - whole).square().sum() / whole.square().sum()
    assert float(lost) == pytest.approx(1 - share, abs=TOLERANCE)
    weights = load_file(source / WEIGHTS)
    a, b = (weights[f"{LAYER}.lora_{side}.weight"] for side in "AB")
    cut = 2 * b[:, :3] @ a[:3]  # the planted fault: the first rows, not the weightiest directions
    assert lost < (cut - whole).square().sum() / whole.square().sum()


def test_a_layer_of_zeros_loses_nothing() -> None:
    a, b, share = nearest(torch.randn(4, 5), torch.zeros(6, 4), 2)
    assert (a.shape, b.shape, share) == ((2, 5), (6, 2), 1)


def test_what_cannot_be_cut_is_named(tmp_path: Path) -> None:
    source, _ = adapter(tmp_path / "one", true_rank=3)
    with pytest.raises(ShrinkError, match="has rank 6; --rank has to be below, got 6"):
        shrink.shrink(source, tmp_path / "out", 6)
    with pytest.raises(ShrinkError, match=r"is no adapter: adapter_config.json is missing"):
        shrink.shrink(tmp_path, tmp_path / "out", 2)
