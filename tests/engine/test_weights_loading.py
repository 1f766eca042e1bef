"""Tiny random models through both stages, transformers and peft: what loads is what was saved."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from serve.adapters import merge_adapter
from serve.checkpoint import check_architecture, context_length, eos_token_ids
from serve.errors import ModelLoadError
from serve.weights import fetch_weights, locate

try:
    import peft
except ModuleNotFoundError:
    support.missing("peft is not installed. Run: pip install -e '.[dev]'")

ROOT = Path(__file__).parents[2]
# peft 0.21 asks transformers 5.24 under a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
PROMPT = torch.tensor([[1, 5, 9, 2]])


def tiny(hidden: int = 32, layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=7,
    )
    return LlamaForCausalLM(config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROMPT).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, use_safetensors=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapt(tmp_path: Path) -> Callable[..., Path]:
    """Save a LoRA adapter with random weights for a model."""

    def save(model: LlamaForCausalLM, base: Path, **options: Any) -> Path:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], **options)
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        adapted.save_pretrained(str(tmp_path / "adapter"))
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
        return tmp_path / "adapter"

    return save


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["single", "sharded"])
def test_saved_model_is_accepted_and_loads_equal(tmp_path: Path, shard_size: str) -> None:
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    source = fetch_weights(locate(str(tmp_path)))
    assert (len(source.weight_files) > 1) == (shard_size == "20KB")
    tensor_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert tensor_bytes < source.num_bytes < tensor_bytes + 1000 * (len(source.weight_files) + 20)
    check_architecture(source.config)
    assert context_length(source.config) == 128
    assert eos_token_ids(source.folder, source.config) == {7}
    torch.testing.assert_close(logits(load(source.folder)), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_merged_model_equals_base_with_adapter(base: Path, adapt: Callable[..., Path], use_dora: bool) -> None:
    source = fetch_weights(locate(str(adapt(tiny(), base, use_dora=use_dora))))
    assert source.adapter is not None
    unmerged = peft.PeftModel.from_pretrained(load(source.folder), source.adapter).eval()
    merged = merge_adapter(load(source.folder), source.adapter)
    assert not merged.training
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in tiny().named_parameters()}
    torch.testing.assert_close(logits(merged), logits(unmerged), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(load(base)), atol=1e-2)


def test_merged_model_generates(base: Path, adapt: Callable[..., Path]) -> None:
    adapter = adapt(tiny(), base)
    unmerged = peft.PeftModel.from_pretrained(load(base), adapter).eval()
    merged: Any = merge_adapter(load(base), adapter)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(PROMPT)
    assert merged.generate(PROMPT, **options).tolist() == unmerged.generate(input_ids=PROMPT, **options).tolist()


@pytest.mark.parametrize("other", [{"hidden": 64}, {"layers": 1}, {"layers": 3}], ids=str)
def test_adapter_of_another_shape_is_refused(tmp_path: Path, adapt: Callable[..., Path], other: dict[str, int]) -> None:
    tiny(**other).save_pretrained(tmp_path / "base")
    adapter = adapt(tiny(), tmp_path / "base")
    with pytest.raises(ModelLoadError, match=rf"The adapter {adapter} does not fit the base model \(.+\). Check base_"):
        merge_adapter(load(tmp_path / "base"), adapter)


def test_adapter_that_is_not_finite_is_refused(base: Path, adapt: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    adapter = adapt(tiny(), base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    save_file(broken, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelLoadError, match="does not fit"):
        merge_adapter(load(base), adapter)


def test_pickled_adapter_is_never_read(base: Path, adapt: Callable[..., Path]) -> None:
    adapter = adapt(tiny(), base)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match=r"adapter_model\.safetensors does not exist"):
        merge_adapter(load(base), adapter)


WITHOUT_PEFT = """
import sys
from pathlib import Path
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peft":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from serve.adapters import merge_adapter
from serve.errors import ModelLoadError
try:
    merge_adapter(None, Path(sys.argv[1]))
except ModelLoadError as error:
    print(error)
"""


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a").save_pretrained(folder)


def run_command(message: str, start: str) -> None:
    """Run the command that a message gives, as it stands."""
    command = shlex.split(message[message.index(start) :])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, cwd=ROOT)


def test_without_peft_the_message_has_two_remedies_that_work(base: Path, adapt: Callable[..., Path]) -> None:
    write_tokenizer(base)
    adapter = adapt(tiny(), base)
    command = [sys.executable, "-c", WITHOUT_PEFT, str(adapter)]
    message = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    assert "which needs peft. Run: pip install 'trimaran[lora]', or merge" in message
    run_command(message, "python -c")
    source = fetch_weights(locate(f"{adapter}-merged"))
    assert (source.folder / "tokenizer.json").exists()
    torch.testing.assert_close(logits(load(source.folder)), logits(merge_adapter(load(base), adapter)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_command_that_converts_pickles_works(base: Path, name: str) -> None:
    write_tokenizer(base)
    expected = logits(load(base))
    state = {key: value.clone() for key, value in load(base).state_dict().items()}
    torch.save(state, base / name)
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="only pickle weights") as refused:
        locate(str(base))
    run_command(str(refused.value), "python -c")
    converted = base.with_name("base-safetensors") if name == "pytorch_model.bin" else base
    torch.testing.assert_close(logits(load(fetch_weights(locate(str(converted))).folder)), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own"}}, "set SERVE_TRUST_REMOTE_CODE=true"),
        ({"model_type": "own"}, r"does not know model_type 'own'.*pip install --upgrade transformers"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5For.* not a causal language model"),
        ({"model_type": "vit", "architectures": None}, "vit is not a causal language model"),
        ({}, "has no model_type"),
    ],
)
def test_architecture_that_cannot_be_built_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        check_architecture(config)


@pytest.mark.parametrize(
    ("config", "trust"),
    [
        ({"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, False),
        ({"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own"}}, True),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, False),
    ],
)
def test_architecture_that_can_be_built_is_accepted(config: dict[str, Any], trust: bool) -> None:
    check_architecture(config, trust)
