"""What a server imports, in a process of its own: this one has imported everything already."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from pathlib import Path
from serve.engine import device
from serve.engine.base import ModelFiles
device.import_torch()
from serve.engine import loader
loader.import_transformers(ModelFiles(folder=Path(sys.argv[1]), decode=str, eos_token_ids=frozenset(), max_model_len=8))
import torch
import transformers
from transformers.utils import is_accelerate_available, is_torch_distributed_available
small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).eval()
shape = list(model(input_ids=torch.arange(6)[None]).logits.shape)
told = dict(
    heavy=[name for name in ("torch._dynamo.convert_frame", "torch._inductor", "torch.distributed.tensor")
           if name in sys.modules],
    parallel=[is_torch_distributed_available(), torch.distributed.is_available()],
    accelerate=["accelerate" in sys.modules, is_accelerate_available()],
    shape=shape,
    compiled=torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(2)).tolist(),
    kind=type(torch._dynamo).__name__,
    disabled=torch._dynamo.disable(lambda: 5)(),
)
print(json.dumps(told))
"""


def test_server_imports_no_compiler_and_has_it_when_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "heavy": [],
        "parallel": [False, True],
        "accelerate": [False, False],
        "shape": [1, 6, 32],
        "compiled": [2.0, 2.0],
        "kind": "module",
        "disabled": 5,
    }
