"""Chat templates against transformers, which is where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from router.fakes import byte_tokenizer
from stateferry.core.errors import InvalidRequest, ModelError
from stateferry.http_front.chat import Conversation
from stateferry.http_front.chat_prompt import chat_prompt
from stateferry.http_front.chat_template import ChatTemplate

# In the manner of ChatML models, with white space that only trimmed blocks leave right.
CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {% if not loop.first or message['role'] == 'system' %}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {{- message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# In the manner of instruction models, which insist on an order of roles.
INSTRUCT = """\
{% if messages[0]['role'] == 'system' %}{% set ns = namespace(system=messages[0]['content']) %}
{% set loop_messages = messages[1:] %}{% else %}{% set ns = namespace(system=false) %}
{% set loop_messages = messages %}{% endif %}
{{ bos_token }}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}[INST] {% if loop.first and ns.system %}{{ ns.system }}

{% endif %}{{ message['content'] }} [/INST]{% else %}
{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}
"""
# In the manner of models with headers, JSON, loop controls and switches of their own.
HEADERS = """\
{{- bos_token }}{% for message in messages %}
{%- if message['role'] == 'skip' %}{% continue %}{% endif %}
{{- '<|header|>' ~ message['role'] ~ '<|end|>' }}
{{- message | tojson(indent=2) }}{{ message['content'] | tojson }}
{%- endfor %}
{%- if thinking is defined and thinking %}<think>{% endif %}
{%- if add_generation_prompt %}<|header|>assistant<|end|>{% endif %}
"""
TEMPLATES = {"chatml": CHATML, "instruct": INSTRUCT, "headers": HEADERS}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi  <b>&\n"}],
    [{"role": "system", "content": " Über 'all' "}, {"role": "user", "content": '"1"\n\n2'}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "{{ c }}"},
    ],
]


def write_model(folder: Path, template: Any = None, **settings: Any) -> Path:
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("add_prompt", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"thinking": True}])
@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_transformers(
    tmp_path: Path, name: str, arguments: dict[str, Any], add_prompt: bool
) -> None:
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    oracle = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    # The two forms in which a directory may write a token.
    model = write_model(
        tmp_path, TEMPLATES[name], bos_token="<s>", eos_token={"content": "</s>", "special": True}
    )
    ours, texts = ChatTemplate.from_directory(model), set()
    for messages in CONVERSATIONS:
        wanted = oracle.apply_chat_template(
            messages,
            chat_template=TEMPLATES[name],
            tokenize=False,
            add_generation_prompt=add_prompt,
            **arguments,
        )
        got = ours.render(messages, add_generation_prompt=add_prompt, arguments=arguments)
        assert got == wanted
        texts.add(got)
    assert len(texts) == len(CONVERSATIONS)


def test_the_file_comes_before_the_setting_and_a_list_has_a_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    messages = CONVERSATIONS[0]
    assert ChatTemplate.from_directory(write_model(tmp_path, named)).render(messages) == "D"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert ChatTemplate.from_directory(tmp_path).render(messages) == "F"


def test_a_model_without_a_template_gets_the_plain_one(tmp_path: Path) -> None:
    template = ChatTemplate.from_directory(tmp_path)
    assert template.is_fallback
    text = template.render(CONVERSATIONS[2])
    assert text == "User: a\n\nAssistant: b\n\nUser: {{ c }}\n\nAssistant:"


@pytest.mark.parametrize("template", [[{"name": "x", "template": "T"}], 7, "{% if %}", "{{"])
def test_an_unusable_template_is_the_models_fault(tmp_path: Path, template: Any) -> None:
    with pytest.raises(ModelError, match="template"):
        ChatTemplate.from_directory(write_model(tmp_path, template))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{% for i in range(100000000) %}x{% endfor %}", "OverflowError"),
        ("{{ nothing.at.all }}", "refuses"),
    ],
)
def test_what_a_template_cannot_or_may_not_do_is_refused(template: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        ChatTemplate(template, {}).render(CONVERSATIONS[0])
    assert caught.value.field == "messages"


async def test_hints_are_where_messages_end() -> None:
    template, tokenizer = ChatTemplate(CHATML, {}), byte_tokenizer()
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "é"}]
    ids, hints = await chat_prompt(template, tokenizer, Conversation(messages, True, {}), 1000)
    text = template.render(messages).encode()
    assert bytes(ids) == text
    ends = [text.index(b"<|im_end|>\n", at) + len(b"<|im_end|>\n") for at in (0, text.index(b"us"))]
    assert list(hints) == ends


async def test_no_hint_where_a_token_reaches_over_the_end() -> None:
    conversation = Conversation([{"role": "system", "content": "ab"}], True, {})
    source = "{{ messages[0]['content'] }}{% if add_generation_prompt %}c{% endif %}"
    template = ChatTemplate(source, {})
    _, hints = await chat_prompt(template, byte_tokenizer(), conversation, 1000)
    assert hints == (2,)
    merged = byte_tokenizer(merges=[("b", "c")])
    ids, hints = await chat_prompt(template, merged, conversation, 1000)
    assert (len(ids), hints) == (2, ())


async def test_a_rendered_prompt_is_bounded_too() -> None:
    conversation = Conversation([{"role": "user", "content": "x"}], True, {})
    template = ChatTemplate("{% for i in range(2000) %}y{% endfor %}", {})
    with pytest.raises(InvalidRequest, match="2000 bytes are more than 1999"):
        await chat_prompt(template, byte_tokenizer(), conversation, 1999)
