"""Chat templates of well-known families, for models that come without one and users who know which it is.

Written here from the formats' published descriptions; a model's own template always goes first. Pure data.
"""

from __future__ import annotations

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

_LLAMA_3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""

# Llama 2 and Mistral: turns must alternate, and the system's words go into the first turn of the user.
_ALTERNATING = """\
{%- set system = messages[0]['content'] | trim if messages[0]['role'] == 'system' else none -%}
{%- set turns = messages if system is none else messages[1:] -%}
{%- for message in turns -%}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{ raise_exception('after an optional system message, user and assistant must take turns, the user first') }}
{%- endif -%}
"""

_LLAMA_2 = (
    _ALTERNATING
    + """\
{%- if message['role'] == 'user' -%}
{%- set opening = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system is not none else '' -%}
{{ bos_token + '[INST] ' + opening + message['content'] | trim + ' [/INST]' }}
{%- else -%}
{{ ' ' + message['content'] | trim + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
)

_MISTRAL = (
    "{{- bos_token -}}\n"
    + _ALTERNATING
    + """\
{%- if message['role'] == 'user' -%}
{%- set opening = system + '\\n\\n' if loop.first and system is not none else '' -%}
{{ '[INST] ' + opening + message['content'] | trim + ' [/INST]' }}
{%- else -%}
{{ ' ' + message['content'] | trim + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
)

NAMED_TEMPLATES = {"chatml": _CHATML, "llama-2": _LLAMA_2, "llama-3": _LLAMA_3, "mistral": _MISTRAL}
