"""One of two processes that join over loopback, with one device of a CPU each; prints what it finds as JSON (test_hosts.py).

Arguments: the address of the coordinator, the number of this process, the folder of a model, an empty folder.
"""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.cluster import HostOptions, join
from qlora_jax.data import Example, batches
from qlora_jax.errors import QLoRAError
from qlora_jax.nn import any_process, check_same, data_mesh, is_main, of_main, put, put_rows, to_numpy, together
from qlora_jax.peft import LoRA
from qlora_jax.train import split
from qlora_jax.train.shared_store import open_store


def main(address: str, number: int, model: str, folder: Path) -> dict[str, Any]:
    """Join, and return what this process finds."""
    join(HostOptions("auto", address, 2, number))
    mesh = data_mesh()
    assert mesh is not None
    found: dict[str, Any] = {"of_main": of_main(lambda: {"step": 3, "number": number})}
    found["signal"] = any_process(15 if number == 1 else None)
    found["errors"] = [_message_of(lambda: check_same("options", f"rank {number}")), _message_of(lambda: _fail(number))]

    split_rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    array = put(np.arange(4, dtype=np.float32), split_rows)
    found["array"] = [np.asarray(array.addressable_shards[0].data).tolist(), to_numpy(array).tolist()]
    examples = [Example(np.array([row, 1, 2], np.int32), np.ones(3, np.uint8)) for row in range(6)]
    found["rows"] = [
        np.asarray(put_rows(mesh, batch["inputs"]).addressable_shards[0].data)[:, 0].tolist()
        for batch in batches(examples, batch_size=4, length=4, pad_id=-1, epochs=1)
    ]

    state = {"split": array, "negative": put(jnp.array([-0.0, jnp.nan]), NamedSharding(mesh, PartitionSpec()))}
    store = open_store(folder / "checkpoints", keep=2)
    store.save(7, state, {"batch": 5})
    restored, position = store.restore(state)
    same = {name: to_numpy(restored[name]).tobytes() == to_numpy(state[name]).tobytes() for name in state}
    found["store"] = [store.latest_step(), position, same, restored["split"].sharding == split_rows]
    store.close()
    found["writes"] = is_main()

    loaded = load_model(open_checkpoint(model), method=LoRA(rank=4), mesh=mesh, progress=False)
    _, adapter, frozen = split(loaded)
    found["parts"] = {
        jax.tree_util.keystr(path): [
            [part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True)],
            zlib.crc32(np.ascontiguousarray(shard.data).tobytes()),
        ]
        for path, leaf in jax.tree_util.tree_leaves_with_path((adapter, frozen))
        for shard in leaf.addressable_shards
    }
    return found


def _fail(number: int) -> None:
    with together():
        if number == 1:
            raise OSError("no such file on this host")


def _message_of(function: Any) -> str:
    try:
        function()
    except (QLoRAError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


if __name__ == "__main__":
    print("\n" + json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))))
