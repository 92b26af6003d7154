"""Chat templates of more than thirty families of models, each written anew in its shortest form: the control
tokens, and the ways in which its author's template takes messages apart (trimming, cutting out reasoning,
macros, blocks, filters). They are this project's own text and carry no model's prompts.
"""
# ruff: noqa: E501  templates are lines of another language

_EACH = "{% for m in messages %}"
_END = "{% endfor %}"


def _turns(before: str, after: str, answer: str, content: str = "m['content']", start: str = "") -> str:
    """A template of turns that only differ in the role."""
    body = f"{_EACH}{before}{{{{ {content} }}}}{after}{_END}"
    return f"{start}{body}{{% if add_generation_prompt %}}{answer}{{% endif %}}"


_HEADER = "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
_TOOL_CALLS = (
    "{% for c in m.tool_calls or [] %}{% if c.function is defined %}{% set c = c.function %}{% endif %}"
    '<tool_call>\n{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
_TOOL_LIST = (
    "{% if tools %}{{ '<tools>' }}{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>{% endif %}"
)
_TEXT_MACRO = (
    "{% macro text(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{% if p.type == 'text' %}"
    "{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)

TEMPLATES: dict[str, str] = {
    "ChatML": _turns("<|im_start|>{{ m.role }}\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
    "Qwen 2.5": (
        f"<|im_start|>system\n{_TOOL_LIST}<|im_end|>\n{_EACH}"
        "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
        "{% else %}{{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        f"{_TOOL_CALLS}<|im_end|>\n{{% endif %}}{_END}<|im_start|>assistant\n"
    ),
    "Qwen 3": (
        "{% set ns = namespace(last=0) %}{% for m in messages[::-1] %}{% set i = messages|length - 1 - loop.index0 %}"
        "{% if m.role == 'user' and m.content is string and not (m.content.startswith('<tool_response>') and "
        "m.content.endswith('</tool_response>')) and not ns.last %}{% set ns.last = i %}{% endif %}{% endfor %}"
        f"{_EACH}{{% set content = m.content if m.content is string else '' %}}{{% if m.role == 'assistant' %}}"
        "{% set thought = '' %}{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
        "{% elif '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if loop.index0 > ns.last %}{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n'"
        " + content.lstrip('\n') }}{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}<|im_end|>\n"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endif %}"
        f"{_END}<|im_start|>assistant\n{{% if enable_thinking is defined and enable_thinking is false %}}"
        "<think>\n\n</think>\n\n{% endif %}"
    ),
    "Qwen 3.5": (
        f"{_TEXT_MACRO}{_EACH}{{% set content = text(m.content)|trim %}}"
        "{% if m.role == 'user' and content.startswith('<tool_response>') %}{{ '<|im_start|>tool\n' ~ content }}"
        "{% elif m.role == 'assistant' and '</think>' in content %}<|im_start|>assistant\n"
        "{{ content.split('</think>', 1)[1] | trim }}{% else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ content }}"
        f"{{% endif %}}<|im_end|>\n{_END}<|im_start|>assistant\n"
    ),
    "Hermes": (
        f"<|im_start|>system\n{_TOOL_LIST}<|im_end|>\n{_EACH}<|im_start|>{{{{ m.role }}}}\n"
        f"{{% if m.content is not none %}}{{{{ m.content }}}}{{% endif %}}{_TOOL_CALLS}<|im_end|>\n{_END}<|im_start|>assistant\n"
    ),
    "Llama 2": (
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% set content = system + m.content if loop.index0 == 0 else m.content %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "Llama 3": _turns(
        _HEADER, "<|eot_id|>", "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}", "m.content | trim",
        "{{ bos_token }}",
    ),
    "Llama 3.1 tools": (
        "{{- bos_token }}{% if not tools is defined %}{% set tools = none %}{% endif %}"
        f"{_EACH}{{% if 'tool_calls' in m %}}{_HEADER}"
        '{{- \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
        "{{- m.tool_calls[0].function.arguments | tojson }}{{ '}<|eot_id|>' }}"
        "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
        f"{{% else %}}{_HEADER}{{{{ m.content | trim }}}}<|eot_id|>{{% endif %}}{_END}"
        "{% if tools is not none %}{% for t in tools %}{{ t | tojson(indent=4) }}\n\n{% endfor %}{% endif %}"
    ),
    "Mistral": (
        f"{{{{ bos_token }}}}{_EACH}{{% if m.role == 'user' %}}{{{{ '[INST] ' ~ m.content ~ ' [/INST]' }}}}"
        f"{{% elif m.role == 'assistant' %}}{{{{ m.content + eos_token }}}}{{% endif %}}{_END}"
    ),
    "Mistral Nemo": (
        "{{ bos_token }}{% if tools is not none %}{{ '[AVAILABLE_TOOLS][' }}{% for t in tools %}{% set f = t.function %}"
        "{{ '{\"type\": \"function\", \"function\": {' }}{% for k, v in f.items() if k != 'return' %}"
        "{{ '\"' + k + '\": ' }}{% if v is string %}{{ '\"' + v + '\"' }}{% else %}{{ v | tojson }}{% endif %}"
        "{{ ', ' if not loop.last else '}}' }}{% endfor %}{{ ', ' if not loop.last else ']' }}{% endfor %}"
        f"[/AVAILABLE_TOOLS]{{% endif %}}{_EACH}{{% if m.role == 'user' %}}{{{{ '[INST]' + m.content + '[/INST]' }}}}"
        "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]{\"content\": ' + m.content|string + '}[/TOOL_RESULTS]' }}"
        f"{{% elif m.content %}}{{{{ ' ' + m.content|trim + eos_token }}}}{{% endif %}}{_END}"
    ),
    "Mistral Small": (
        f"{_TEXT_MACRO}{{{{ bos_token }}}}{_EACH}{{% if m.role == 'system' %}}[SYSTEM_PROMPT]{{{{ text(m.content) }}}}"
        "[/SYSTEM_PROMPT]{% elif m.role == 'user' %}[INST]{{ text(m.content) }}[/INST]{% elif m.role == 'assistant' %}"
        f"{{{{ text(m.content or '') }}}}{{{{ eos_token }}}}{{% endif %}}{_END}"
    ),
    "Gemma": (
        f"{{{{ bos_token }}}}{_EACH}{{% set role = 'model' if m.role == 'assistant' else m.role %}}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
        f"{_END}{{{{ '<start_of_turn>model\n' }}}}"
    ),
    "Gemma 3": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
        "{% set loop_messages = messages[1:] %}{% else %}{% set first = '' %}{% set loop_messages = messages %}{% endif %}"
        "{% for m in loop_messages %}{{ '<start_of_turn>' + m.role + '\n' + (first if loop.first else '') }}"
        "{% if m.content is string %}{{ m.content | trim }}{% elif m.content is iterable %}{% for p in m.content %}"
        "{% if p['type'] == 'text' %}{{ p['text'] | trim }}{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}"
        f"{_END}<start_of_turn>model\n"
    ),
    "Phi 3": _turns("{{ '<|' + m['role'] + '|>\n' }}", "{{ '<|end|>\n' }}", "{{ '<|assistant|>\n' }}"),
    "Phi 4": _turns("{{ '<|im_start|>' + m.role + '<|im_sep|>' }}", "<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
    "Zephyr": _turns("{{ '<|' + m.role + '|>\n' }}", "{{ eos_token }}\n", "<|assistant|>\n"),
    "Vicuna": (
        f"{_EACH}{{% if m.role == 'user' %}}{{{{ 'USER: ' + m.content }}}} {{% else %}}"
        f"{{{{ m.role | upper ~ ': ' ~ m.content ~ eos_token }}}}{{% endif %}}{_END}ASSISTANT:"
    ),
    "Alpaca": _turns("### {{ m.role | capitalize }}:\n", "\n\n", "### Response:\n", "m.content | trim | safe"),
    "OpenChat": _turns("{{ 'GPT4 Correct ' + m.role.title() + ': ' }}", "<|end_of_turn|>", "GPT4 Correct Assistant:"),
    "DeepSeek V2": (
        f"{{{{ bos_token }}}}{_EACH}{{% if m.role == 'user' %}}User: {{{{ m.content }}}}\n\n{{% elif m.role == "
        f"'assistant' %}}Assistant: {{{{ m.content + eos_token }}}}{{% else %}}{{{{ m.content }}}}\n\n{{% endif %}}{_END}"
    ),
    "DeepSeek R1": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}"
        "{% set ns.system = ns.system + m.content %}{% endfor %}{{ ns.system }}"
        f"{_EACH}{{% if m.role == 'user' %}}{{{{ '<｜User｜>' + m.content }}}}{{% elif m.role == 'assistant' %}}"
        "{% set content = m.content or '' %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
        f"{{% endif %}}{{{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}}}{{% endif %}}{_END}<｜Assistant｜><think>\n"
    ),
    "Command R": (
        f"{{{{ bos_token }}}}{_EACH}{{% set role = {{'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}} %}}"
        "<|START_OF_TURN_TOKEN|>{{ role.get(m.role, '<|SYSTEM_TOKEN|>') }}{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>"
        f"{_END}{{% for d in documents or [] %}}\nDocument: {{{{ loop.index0 }}}}\n{{{{ d['title'] }}}}\n{{{{ d['text'] }}}}"
        "{% endfor %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    ),
    "Granite": (
        f"{_EACH}<|start_of_role|>{{{{ m.role }}}}<|end_of_role|>{{{{ m.content }}}}<|end_of_text|>\n{_END}"
        "{% for d in documents or [] %}<|start_of_role|>document {\"document_id\": \"{{ loop.index }}\"}<|end_of_role|>"
        "{{ d.text }}<|end_of_text|>\n{% endfor %}<|start_of_role|>assistant<|end_of_role|>"
    ),
    "gpt-oss": (
        f"{_EACH}{{% if m.role == 'assistant' %}}{{% if m.thinking %}}<|start|>assistant<|channel|>analysis<|message|>"
        "{{ m.thinking }}<|end|>{% endif %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
        "{% elif m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary<|message|>"
        "{{ m.content | tojson }}<|end|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
        f"{_END}<|start|>assistant"
    ),
    "GLM 4": _turns("<|{{ m.role }}|>\n", "", "<|assistant|>\n", "m.content | trim", "[gMASK]<sop>"),
    "GLM 4.6": (
        "[gMASK]<sop>{% if tools %}<|system|>\n{% for t in tools %}{{ t | tojson(ensure_ascii=False) }}\n{% endfor %}{% endif %}"
        f"{_EACH}<|{{{{ m.role }}}}|>\n{{{{ m.content }}}}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}\n{% for k, v in c.function.arguments.items() %}"
        "<arg_key>{{ k }}</arg_key><arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>"
        f"{{% endfor %}}</tool_call>{{% endfor %}}{_END}<|assistant|>"
    ),
    "Kimi": (
        f"{_EACH}{{% if m.role == 'user' %}}<|im_user|>{{% elif m.role == 'assistant' %}}<|im_assistant|>{{% else %}}"
        "<|im_system|>{% endif %}{{ m.name or m.role }}<|im_middle|>{{ m.content }}<|im_end|>"
        f"{_END}<|im_assistant|>assistant<|im_middle|>"
    ),
    "MiniMax": (
        f"{_EACH}<beginning_of_sentence>{{{{ m.role }}}} name={{{{ m.name or m.role }}}}\n{{{{ m.content }}}}<end_of_sentence>\n"
        f"{_END}{{% for t in tools or [] %}}{{{{ t | tojson(ensure_ascii=True, sort_keys=True) }}}}\n{{% endfor %}}"
        "<beginning_of_sentence>ai name=assistant\n"
    ),
    "LFM2": (
        "{{ bos_token }}{% if tools %}List of tools: <|tool_list_start|>[{% for t in tools %}"
        "{{ t if t is string else t | tojson(separators=(',', ':')) }}{% if not loop.last %}, {% endif %}{% endfor %}]"
        f"<|tool_list_end|>{{% endif %}}{_EACH}<|im_start|>{{{{ m.role }}}}\n{{% set content = m.content %}}"
        "{% if content is not string %}{% set content = content | tojson %}{% endif %}{{ content }}<|im_end|>\n"
        f"{_END}<|im_start|>assistant\n"
    ),
    "SmolLM3": (
        f"{{% set mode = '/no_think' if messages[0].content is string and '/no_think' in messages[0].content else '/think' %}}"
        f"{_EACH}<|im_start|>{{{{ m.role }}}}\n{{% generation %}}{{{{ m.content | replace('/no_think', '') | trim }}}}"
        f"{{% endgeneration %}}<|im_end|>\n{_END}<|im_start|>assistant\n{{{{ mode }}}}"
    ),
    "EXAONE": _turns("{{ '[|' + m.role + '|]' }}", "[|endofturn|]\n", "[|assistant|]", "m.content.strip('\n')"),
    "Seed-OSS": _turns("<seed:bos>{{ m.role }}\n", "<seed:eos>", "<seed:bos>assistant\n"),
    "Jamba": (
        "{% macro turn(role, content) %}<|bom|><|{{ role }}|> {{ content }}<|eom|>{% endmacro %}"
        f"{_EACH}{{{{ turn(m.role, m.content) }}}}{_END}<|bom|><|assistant|>"
    ),
    "Apertus": (
        f"{_EACH}{{% filter trim %}}<|{{{{ m.role }}}}_start|>{{{{ m.content }}}}<|{{{{ m.role }}}}_end|>{{% endfilter %}}{_END}"
        "{% set tail %}<|assistant_start|>{% endset %}{{ tail }}"
    ),
    "Functionary": (
        "{% for t in tools or [] %}{{ \"Use '\"|safe + t.function.name + \"' to '\"|safe + t.function.description + \"'\n\"|safe"
        f" + t.function | tojson }}}}\n{{% endfor %}}{_EACH}<|start_header_id|>{{{{ m.role }}}}<|end_header_id|>\n\n"
        f"{{{{ m.content }}}}<|eot_id|>{_END}<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "Nemotron": (
        f"{_EACH}{{% if loop.first and m.role != 'system' %}}<SPECIAL_10>System\n{{% endif %}}<SPECIAL_11>{{{{ m.role|capitalize }}}}\n"
        "{% set words = m.content.split() if m.content is string else [] %}{{ words | join(' ') }}\n"
        f"{{% if loop.index > 40 %}}{{% break %}}{{% endif %}}{_END}<SPECIAL_11>Assistant\n"
    ),
}  # fmt: skip

#: Everything that one of them writes as a control token, as those models' vocabularies have it.
CONTROLS: tuple[str, ...] = (
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|im_middle|>", "<|im_user|>",
    "<|im_assistant|>", "<|im_system|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]",
    "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|tool|>", "<|end|>", "<|end_of_turn|>", "<｜User｜>", "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>",
    "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "[gMASK]", "<sop>", "<beginning_of_sentence>",
    "<end_of_sentence>", "<|tool_list_start|>", "<|tool_list_end|>", "[|endofturn|]", "[|user|]",
    "[|assistant|]", "<seed:bos>", "<seed:eos>", "<|bom|>", "<|eom|>", "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>", "<SPECIAL_10>", "<SPECIAL_11>",
)  # fmt: skip
