"""One rank of a tensor-parallel tiny model; run as a program it is a follower: rank.py FOLDER RANK RANKS FAMILY..."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from layercast_agent.engine.fast import FastModel
from layercast_agent.engine.model import shape_of
from layercast_agent.engine.ranks import RankKV, Ranks, follow
from layercast_agent.parameters import tensor_split
from layercast_agent.tensor_parallel import Split, part_of

CPU = torch.device("cpu")
PAGES, PAGE_SIZE = 64, 4


def share(tiny: Any, families: Any, split: Split) -> dict[str, torch.Tensor]:
    """The rank's parts of a tiny model's parameters, packed."""
    parts = {}
    for name, whole in families.parameters(tiny.judge, tiny.model).items():
        part = part_of(name, tuple(whole.shape), split)
        if part is None:
            parts[name] = whole
        else:
            spans = [whole.narrow(part.axis, first, last - first) for first, last in part.spans]
            parts[name] = torch.cat(spans, dim=part.axis)
    packed: dict[str, torch.Tensor] = families.packed(parts)
    return packed


def rank_model(tiny: Any, families: Any, ranks: Ranks) -> tuple[FastModel, RankKV]:
    """The rank's model with its parameters, and its KV heads."""
    shape = shape_of(tiny.config, "float32")
    split = tensor_split(tiny.config, rank=ranks.split.rank, ranks=ranks.split.ranks)
    model = FastModel(config=tiny.config, shape=shape, device=CPU, ranks=ranks)
    model.attach(share(tiny, families, split))
    return model, RankKV(shape, PAGES, PAGE_SIZE, ranks=ranks)


def join(tiny: Any, folder: Path, rank: int, count: int) -> Ranks:
    """Meets the other ranks of one model."""
    split = tensor_split(tiny.config, rank=rank, ranks=count)
    return Ranks(split, CPU, f"file://{folder}/{tiny.config['model_type']}")


def main() -> None:
    """Follows for one family after the other."""
    folder, rank, count, *names = sys.argv[1:]
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("families", Path(__file__).with_name("families.py"))
    assert spec is not None and spec.loader is not None
    families = importlib.util.module_from_spec(spec)
    sys.modules["families"] = families
    spec.loader.exec_module(families)
    for name in names:
        tiny = families.build(name, "fast")
        ranks = join(tiny, Path(folder) / name, int(rank), int(count))
        model, kv = rank_model(tiny, families, ranks)
        follow(model, kv, ranks)
        ranks.leave()


if __name__ == "__main__":
    main()
