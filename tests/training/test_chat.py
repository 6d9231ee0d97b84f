"""Chat templates: who says what, and what a template from anywhere may not do."""

from __future__ import annotations

import time

import pytest

from lora_jax.training.data.chat import DEFAULT_TEMPLATE, Part, render_conversations, render_prompts
from lora_jax.training.errors import DataError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye"},
]
# ChatML as Qwen's and SmolLM's templates have it, with a tag that transformers adds to Jinja.
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{- message['content'] + '<|im_end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# As reasoning models have it: what earlier answers thought isn't shown again.
FORGETFUL = """\
{%- for message in messages %}{{ message.role }}:
{%- if message.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ message.content }};
{%- endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def render(template, talk=TALK, **options):
    options = {"tokens": {"eos_token": "</s>"}, "name": "talks.jsonl", **options}
    return render_conversations([talk], template=template, **options)[0]


def test_the_default_template():
    assert render(None) == (
        Part("system:\nBe brief.\nuser:\nHi\nassistant:\n", False),
        Part("Hello</s>\n", True),
        Part("user:\nAnd?\nassistant:\n", False),
        Part("Bye</s>\n", True),
    )
    (first, *_) = render(DEFAULT_TEMPLATE, tokens={"bos_token": "<s>", "eos_token": "</s>"})
    assert first.text.startswith("<s>system:")


def test_chatml():
    assert render(CHATML) == (
        Part("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        Part("Hello<|im_end|>\n", True),
        Part("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", False),
        Part("Bye<|im_end|>\n", True),
    )


def test_what_follows_the_last_answer_is_kept():
    *_, last = render(None, [*TALK, {"role": "user", "content": "Wait"}])
    assert last == Part("user:\nWait\n", False)


def test_a_template_that_forgets_is_refused_where_it_matters():
    assert render(FORGETFUL, TALK[1:3])[-1] == Part("<think></think>Hello;", True)
    with pytest.raises(DataError, match=r"talks.jsonl, row 1: .* the messages before message 3 differently .* one ans"):
        render(FORGETFUL)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for x in", r"is not valid Jinja: .* \(line 1\)"),
        ("{{ raise_exception('No system here') }}", r"says: No system here"),
        ("{{ messages.nothing.more }}", r"says: .* has no attribute 'nothing'"),
        ("{{ messages[0] / 2 }}", r"fails: TypeError"),
        ("", r"renders nothing of message 3"),
        # Out of the sandbox.
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", r"does what the sandbox forbids"),
        ("{{ lipsum.__globals__['os'].popen('id').read() }}", r"does what the sandbox forbids"),
        ("{{ cycler.__init__.__globals__.os.system('id') }}", r"does what the sandbox forbids"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", r"does what the sandbox forbids"),
        # Undefined, so that nothing is shown; used, it is forbidden as above.
        ("{{ strftime_now.__globals__ }}", r"renders nothing of message 3"),
        ("{{ '{0.__class__}'.format(messages) }}", r"renders nothing of message 3"),
        ("{{ messages|attr('__class__') }}", r"renders nothing of message 3"),
        ("{{ messages.append(1) }}", r"does what the sandbox forbids"),
        ("{{ messages[0].update(role='x') }}", r"does what the sandbox forbids"),
        ("{% include '/etc/passwd' %}", r"fails: TypeError: no loader|says: "),
    ],
)
def test_what_is_wrong_is_told(template, message):
    with pytest.raises(DataError, match=rf"talks.jsonl, row 1: the base's chat template ({message})"):
        render(template)


DOUBLING = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, r"did not finish within 1 s"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", r"fails: RecursionError"),
        ("{{ range(1000000) | list }}", r"fails: OverflowError|uses too much memory"),
        ("{{ 'x' * 10**10 }}", r"uses too much memory"),
        ("{{ 'x'.center(10**7) }}", r"gave more than 4,000,000 characters"),
        (DOUBLING, r"uses too much memory|did not finish within 1 s"),
        ("{{ 'x' * 3000000 }}{{ 'y' * 3000000 }}", r"gave more than 4,000,000 characters"),
        # Time in C, which no signal stops: the process is killed.
        ("{{ 9 ** (9 ** 9) }}", r"did not finish within 1 s|uses too much memory"),
        ("{{ (7 ** 99999999) % 7 }}", r"did not finish within 1 s|uses too much memory"),
        (
            "{% if messages | length ** 99999999 ** 2 > 1 %}a{% endif %}",
            r"did not finish within 1 s|uses too much memory",
        ),
    ],
)
def test_an_endless_or_greedy_template_ends(template, message):
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"talks.jsonl, row 1: the base's chat template ({message})"):
        render(template, seconds=1.0)
    assert time.monotonic() - started < 30


def test_the_row_at_fault_is_named():
    template = "{% if messages[0].content == 'bad' %}" + ENDLESS + "{% endif %}" + DEFAULT_TEMPLATE
    talks = [[{"role": "user", "content": word}, TALK[2]] for word in ("good", "bad", "good")]
    with pytest.raises(DataError, match=r"talks.jsonl, row 2: the base's chat template did not finish within 1 s"):
        render_conversations(talks, template=template, tokens={"eos_token": ""}, name="talks.jsonl", seconds=1.0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'x'.center(10**7) }}", r"gave more than 4,000,000 characters"),
        ("{{ 9 ** (9 ** 9) }}", r"did not finish within 1 s|uses too much memory"),
        (ENDLESS, r"did not finish within 1 s"),
    ],
)
def test_a_prompt_has_the_limits_of_a_conversation(template, message):
    with pytest.raises(DataError, match=rf"asked, row 1: the base's chat template ({message})"):
        render_prompts([TALK[:2]], template=template, tokens={"eos_token": ""}, name="asked", seconds=1.0)


def test_all_renderings_together_have_a_limit(monkeypatch):
    monkeypatch.setattr("lora_jax.training.data.chat._MOST_TEXT", 5_000_000)
    talks = [TALK[1:3]] * 4
    with pytest.raises(
        DataError, match=r"talks.jsonl, row 2: the base's chat template has written \d,\d+,\d+ bytes so far"
    ):
        render_conversations(
            talks, template="{{ 'x' * 3000000 }}" + DEFAULT_TEMPLATE, tokens={"eos_token": ""}, name="talks.jsonl"
        )
