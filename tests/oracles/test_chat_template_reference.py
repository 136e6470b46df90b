"""Rendered chats against transformers' own: templates of the kinds that models ship, and random conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama.chat_template import ChatTemplate, encode_chat
from pyllama.common.named_templates import NAMED_TEMPLATES
from pyllama.tokenizer import Tokenizer
from quantize.readers.gguf_vocab import tokenizer_files

from ..helpers_tokenizer import write_folder
from ..make_golden_tokenizer import demo_metadata, demo_reference

# Written for this test; each uses what a family's templates use.
TEMPLATES = {
    **NAMED_TEMPLATES,
    "tools": """
{%- set ns = namespace(n=0, system=none) %}
{%- if tools is not none and tools is defined %}
    {{- '<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}{{ "," if not loop.last }}
    {%- endfor %}
    {{- '</tools>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set ns.system = message.content | trim %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {{- '[' ~ ns.n ~ '/' ~ messages | length ~ ' ' ~ message['role'] ~ ']' }}
    {%- if '</think>' in message.content %}
        {{- message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
{{- messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | tojson }}
{%- if ns.system is not none %}{{ ns.system | upper | replace('A', 'b') }}{% endif %}
""",
    "macros": """
{%- macro turn(role, content) -%}
    <{{ role }}>{{ content | string | trim }}</{{ role }}>
{%- endmacro -%}
{% for message in messages[::-1] if message.role != 'system' %}
{{ turn(message.role, message.content) }}{{ eos_token if loop.last else bos_token }}
{% else %}
nobody
{% endfor %}
{% set text %}{% filter upper %}{{ messages[-1].content }}{% endfilter %}{% endset %}
{{ '%s:%02d' % (text, messages | length) }}{% generation %}{{ messages[0].role }}{% endgeneration %}
""",
}

TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(list("<>&'\"{}% \n\t")), max_size=20)
ROLES = st.sampled_from(["user", "assistant"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXT}), min_size=1, max_size=5)


def alternating(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    turns = [{**m, "role": "assistant" if i % 2 else "user"} for i, m in enumerate(messages)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def reference(source: str, messages: list[dict[str, Any]], add_generation_prompt: bool, **variables: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[messages],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
        **variables,
    )
    return str(rendered[0])


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=150)
@given(messages=MESSAGES, system=st.none() | TEXT, prompt=st.booleans())
def test_rendered_as_transformers_does(
    name: str, messages: list[dict[str, Any]], system: str | None, prompt: bool
) -> None:
    talk = alternating(messages, system)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"é<": [1, 2.5, None, True]}}}]
    variables = {"tools": tools} if name == "tools" and prompt else {}
    ours = ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>").render(talk, prompt, **variables)
    assert ours == reference(TEMPLATES[name], talk, prompt, **variables)


@settings(max_examples=60)
@given(messages=MESSAGES)
def test_the_demo_models_chats_have_transformers_ids(demo_chat: Any, messages: list[dict[str, Any]]) -> None:
    tokenizer, template, transformers_tokenizer = demo_chat
    talk = alternating(messages, None)
    expected = transformers_tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True)
    ids = expected if isinstance(expected, list) else expected["input_ids"]
    assert encode_chat(tokenizer, template, talk) == ids


@pytest.fixture(scope="module")
def demo_chat(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    metadata = demo_metadata(demo_gguf)
    folder = write_folder(tmp_path_factory.mktemp("demo"), tokenizer_files(metadata))
    transformers_tokenizer = demo_reference(metadata)
    transformers_tokenizer.chat_template = metadata["tokenizer.chat_template"]
    return Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder), transformers_tokenizer
