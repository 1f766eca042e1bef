"""Templates and tokenizers without transformers."""

from __future__ import annotations

import json

import pytest

from serve.chat.prompt import ChatFormat
from serve.chat.template import ChatTemplate
from serve.chat.tokenizer import HubTokenizer
from serve.errors import InvalidRequest, ModelLoadError

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages=USER) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages)


def test_template_sees_messages_special_tokens_and_the_generation_prompt():
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[A]{% endif %}"
    )
    assert render(source) == "<s>[user]hi[A]"


def test_template_drops_the_line_breaks_of_blocks():
    assert render("{% if true %}\n  {{ messages[0].content }}\n{% endif %}\n!") == "  hi\n!"


def test_template_json_is_not_escaped_for_html():
    assert (
        render("{{ messages | tojson }}", [{"role": "user", "content": "<é&'>"}])
        == '[{"role": "user", "content": "<é&\'>"}]'
    )


def test_template_generation_blocks_and_loop_controls_work():
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "hi"


def test_template_can_name_the_date():
    assert render("{{ strftime_now('%Y') }}").isdigit()


def test_template_refusal_keeps_the_templates_words():
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", ["{{ messages[3].content.upper() }}", "{{ 1 / 0 }}", "{{ messages + 1 }}"])
def test_template_that_fails_on_the_messages_is_the_callers_error(source):
    with pytest.raises(InvalidRequest):
        render(source)


@pytest.mark.parametrize(
    "source", ["{{ messages.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}", "{{ messages.append(1) }}"]
)
def test_template_cannot_leave_the_sandbox(source):
    with pytest.raises(InvalidRequest):
        render(source)


def test_template_that_is_not_jinja_stops_the_load():
    with pytest.raises(ModelLoadError, match="not valid Jinja"):
        ChatTemplate("{% if %}", {})


@pytest.fixture
def folder(tmp_path):
    """A word-level tokenizer as a model's folder has it."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({"hi": 0, "there": 1, "[unk]": 2}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.enable_truncation(1)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": {"content": "<end>"}, "bos_token": None, "chat_template": "{{ messages[0].content }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_tokenizer_encodes_without_truncating_and_decodes_without_specials(folder):
    tokenizer = HubTokenizer(folder)
    assert tokenizer.encode("hi there hi <end>") == [0, 1, 0, 3]
    assert tokenizer.decode([0, 1, 3]) == "hi there"
    assert tokenizer.special_tokens == {"eos_token": "<end>"}
    assert tokenizer.token_id("<end>") == 3


def test_chat_template_file_wins_over_the_config_and_the_operators_over_both(folder):
    assert ChatFormat(HubTokenizer(folder)).prompt([{"role": "user", "content": "hi"}]) == (0,)
    (folder / "chat_template.jinja").write_text("there")
    assert ChatFormat(HubTokenizer(folder)).prompt(USER) == (1,)
    assert ChatFormat(HubTokenizer(folder), "hi there").prompt(USER) == (0, 1)


def test_named_chat_templates_use_the_default(folder):
    config = {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": "there"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatFormat(HubTokenizer(folder)).prompt(USER) == (1,)


def test_model_without_chat_template_says_what_to_do(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="SERVE_CHAT_TEMPLATE"):
        ChatFormat(HubTokenizer(folder)).prompt(USER)


def test_prompt_that_renders_to_nothing_is_refused(folder):
    with pytest.raises(InvalidRequest, match="empty"):
        ChatFormat(HubTokenizer(folder), "").prompt(USER)


def test_tokenizer_that_cannot_be_read_stops_the_load(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        HubTokenizer(folder)
