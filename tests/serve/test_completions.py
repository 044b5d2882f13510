"""Chat completions through the real openai client: what comes back, whole and streamed, and what is refused in words."""

import math

import pytest
from openai import BadRequestError, InternalServerError, NotFoundError, pydantic_function_tool
from pydantic import BaseModel

from art_mcp.core.dialect import TemplateDialect
from art_mcp.core.seeds import seed_of
from art_mcp.errors import EngineError
from art_mcp.serve.turn import Voice
from tests.agent.players import calls, dialect, tokenizer, tokens
from tests.serve.guests import LOOK, USER, Told, direct, opened, voice_of

pytestmark = pytest.mark.anyio

ADD = ("add", {"a": 2, "b": 3})
BOTH = calls(ADD, ("add", {"a": -1, "b": 0}))


async def ask(sampler, *, messages=(USER,), **options):
    async with direct(voice_of(sampler)) as (client, _):
        return await client.chat.completions.create(**{"model": "told", "messages": list(messages), "tools": [LOOK]} | options)


async def test_an_answer_says_which_policy_gave_it_and_how_many_tokens_it_took():
    told = Told(["It is 5."], steps=[4])
    answer = await ask(told, seed=7, max_tokens=50, temperature=0.5)
    ((prompt, params),) = told.asked
    assert tokenizer().decode(prompt).endswith("What is 2 plus 3?<|im_end|>\n<|im_start|>assistant\n")
    assert (params.seed, params.max_tokens, params.temperature) == (7, 50, 0.5)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("It is 5.", None, "stop")
    assert (answer.model, answer.art_mcp) == ("told@4", {"bridged": False, "policy": "told@4"})
    count = len(tokens("It is 5."))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), count)
    assert answer.usage.total_tokens == len(prompt) + count
    assert choice.logprobs is None
    assert not hasattr(answer, "prompt_token_ids")


async def test_parallel_calls_come_as_calls_with_ids_of_their_own():
    answer = await ask(Told([BOTH]))
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    made = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in made] == [
        ("add", '{"a": 2, "b": 3}'),
        ("add", '{"a": -1, "b": 0}'),
    ]
    assert len({call.id for call in made}) == 2
    assert all(len(call.id) == 9 and call.id.isalnum() for call in made)
    assert choice.art_mcp == {"malformed": []}


UNFIT = calls(("add", {"a": "two", "b": 3}))
UNKNOWN = calls(("sum", {"of": [2, 3]}))
UNREADABLE = '<tool_call>\n{"name": "add"\n</tool_call>'


async def test_a_call_that_does_not_fit_is_a_call_all_the_same_whose_mistake_is_named():
    """As OpenAI and vLLM hand them out: the agent looks for the tool, finds what is wrong, and tells the model."""
    answer = await ask(Told([f"Let me see.\n{calls(ADD)}\n{UNFIT}\n{UNKNOWN}", f"{UNKNOWN}\n{UNFIT}"]), n=2)
    first, second = answer.choices
    made = [(call.function.name, call.function.arguments) for call in first.message.tool_calls]
    assert made == [("add", '{"a": 2, "b": 3}'), ("add", '{"a": "two", "b": 3}'), ("sum", '{"of": [2, 3]}')]
    assert (first.finish_reason, first.message.content) == ("tool_calls", "Let me see.")
    named = first.art_mcp["malformed"]
    assert [(one["index"], one["id"], one["kind"], one["text"]) for one in named] == [
        (1, first.message.tool_calls[1].id, "schema", UNFIT),
        (2, first.message.tool_calls[2].id, "unknown_tool", UNKNOWN),
    ]
    assert 'no tool "sum"' in named[1]["error"]
    assert [call.function.name for call in second.message.tool_calls] == ["sum", "add"]
    assert (second.finish_reason, second.message.content) == ("tool_calls", None)
    assert len({call.id for choice in answer.choices for call in choice.message.tool_calls}) == 5


async def test_a_call_that_is_no_json_is_text_and_is_named():
    turn = f"So.\n{UNREADABLE}\n{UNFIT}\nOr {UNREADABLE}"
    mixed, alone = (await ask(Told([turn, UNREADABLE]), n=2)).choices
    assert mixed.message.content == f"So.\n{UNREADABLE}\nOr \n{UNREADABLE}"
    assert [call.function.arguments for call in mixed.message.tool_calls] == ['{"a": "two", "b": 3}']
    assert [one.get("id") for one in mixed.art_mcp["malformed"]] == [None, mixed.message.tool_calls[0].id, None]
    assert [one["index"] for one in mixed.art_mcp["malformed"]] == [0, 1, 2]
    assert (alone.finish_reason, alone.message.content, alone.message.tool_calls) == ("stop", UNREADABLE, None)
    assert [one["kind"] for one in alone.art_mcp["malformed"]] == ["invalid_json"]


def strictly(tool):
    return {**tool, "function": {**tool["function"], "strict": True}}


@pytest.mark.parametrize(
    ("turn", "options"),
    [
        (UNFIT, {"tool_choice": "none"}),
        (UNKNOWN, {"tools": None}),
        (UNFIT, {"tools": [strictly(LOOK)]}),
        (UNKNOWN, {"tools": [strictly(LOOK)]}),
    ],
    ids=["no calls are wanted", "no tools", "a strict tool", "only strict tools"],
)
async def test_a_call_that_does_not_fit_is_text_where_a_client_counts_on_its_fitting(turn, options):
    (choice,) = (await ask(Told([turn]), **options)).choices
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", turn, None)
    assert len(choice.art_mcp["malformed"]) == (options.get("tool_choice") != "none")


async def test_token_ids_and_logprobs_cover_all_that_was_sampled_the_stop_token_too():
    told = Told(["5"])
    answer = await ask(told, logprobs=True, extra_body={"return_token_ids": True})
    (choice,) = answer.choices
    assert answer.prompt_token_ids == list(told.asked[0][0])
    assert choice.token_ids == tokens("5")
    assert [entry.logprob for entry in choice.logprobs.content] == [-0.25, -0.5]
    assert [entry.token for entry in choice.logprobs.content] == ["5", "<|im_end|>"]
    assert [bytes(entry.bytes) for entry in choice.logprobs.content] == [b"5", b"<|im_end|>"]
    assert [entry.top_logprobs for entry in choice.logprobs.content] == [[], []]


class Endless(Told):
    """A Told whose first token cannot have been sampled."""

    async def sample(self, token_ids, **options):
        done = await super().sample(token_ids, **options)
        object.__setattr__(done.span, "logprobs", (-math.inf, *done.span.logprobs[1:]))
        return done


async def test_a_log_probability_that_json_has_no_number_for_is_a_low_one():
    (choice,) = (await ask(Endless(["5"]), logprobs=True)).choices
    assert [entry.logprob for entry in choice.logprobs.content] == [-9999.0, -0.5]


async def collect(stream):
    return [chunk async for chunk in stream]


@pytest.mark.parametrize("turn", ["It is 5.", f"Let me see.\n{BOTH}", f"{UNFIT}\n{UNREADABLE}\n{UNKNOWN}", ""])
async def test_a_stream_adds_up_to_the_whole_answer(turn):
    options = {"n": 2, "logprobs": True, "seed": 1, "extra_body": {"return_token_ids": True}}
    whole = await ask(Told([turn]), **options)
    async with direct(voice_of(Told([turn]))) as (client, _):
        asked = {"model": "told", "messages": [USER], "tools": [LOOK], "stream_options": {"include_usage": True}} | options
        chunks = await collect(await client.chat.completions.create(stream=True, **asked))
        del asked["stream_options"], asked["n"]
        async with client.chat.completions.stream(**asked) as stream:
            gathered = await stream.get_final_completion()
    assert {chunk.model for chunk in chunks} == {"told@0"}
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == (choice.message.content or "")
        assert parts[-1].finish_reason == choice.finish_reason
        assert [part.token_ids for part in parts if hasattr(part, "token_ids")] == [choice.token_ids]
        assert [part.logprobs.model_dump() for part in parts if part.logprobs] == [choice.logprobs.model_dump()]
        arguments = [call.function.arguments for part in parts for call in part.delta.tool_calls or ()]
        assert "".join(arguments) == "".join(call.function.arguments for call in choice.message.tool_calls or ())
    first, last = whole.choices[0].message, gathered.choices[0].message
    assert (last.content or None) == (first.content or None)
    named = [[(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or ()] for message in (first, last)]
    assert named[0] == named[1]


async def test_every_choice_has_a_seed_of_its_own_that_depends_on_the_given_one_alone():
    runs = []
    for _ in range(2):
        told = Told(["a"])
        assert [choice.index for choice in (await ask(told, n=3, seed=5)).choices] == [0, 1, 2]
        runs.append([params.seed for _, params in told.asked])
    assert runs[0] == runs[1] == [5, seed_of(5, "choice", 1), seed_of(5, "choice", 2)]
    unseeded = Told(["a"])
    await ask(unseeded, n=3)
    await ask(unseeded)
    assert len({params.seed for _, params in unseeded.asked}) == 4


async def test_choices_of_one_answer_are_of_one_policy_even_if_another_is_published_meanwhile():
    told = Told(["a"], steps=[0, 0, 1])
    answer = await ask(told, n=3)
    assert len(told.asked) == 6
    assert (answer.model, len(answer.choices)) == ("told@1", 3)


async def test_a_request_for_one_policy_is_not_answered_by_the_next():
    with pytest.raises(NotFoundError, match="'told@0' is no longer served: the current one is 'told@1'") as refusal:
        await ask(Told(["a"], steps=[0, 1]), model="told@0", n=2)
    assert refusal.value.code == "policy_replaced"
    assert (await ask(Told(["a"], steps=[3]), model="told@3")).model == "told@3"


@pytest.mark.parametrize("name", ["other", "told@", "told@9", "@0", "told@0@0", ""])
async def test_a_model_that_is_not_there_is_refused_with_the_one_that_is(name):
    with pytest.raises(NotFoundError, match="told@0"):
        await ask(Told(["a"]), model=name)


async def test_a_turn_ends_where_its_first_stop_is_complete():
    turn = "One, two, three, four."
    told = Told([turn])
    answer = await ask(told, stop=["four", "thr"], logprobs=True, extra_body={"return_token_ids": True})
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("One, two, ", "stop")
    kept = tokenizer().decode(choice.token_ids)
    assert kept.startswith("One, two, thr")
    assert "thr" not in tokenizer().decode(choice.token_ids[:-1])
    assert choice.token_ids == tokens(turn)[: len(choice.token_ids)]
    assert len(choice.logprobs.content) == len(choice.token_ids) == answer.usage.completion_tokens
    assert (await ask(Told([turn]), stop="five")).choices[0].message.content == turn


async def test_a_turn_without_an_end_is_as_long_as_it_may_be():
    (choice,) = (await ask(Told(["One, two, three."]), max_tokens=2, max_completion_tokens=3)).choices
    assert choice.finish_reason == "length"
    assert choice.message.content == tokenizer().decode(tokens("One, two, three.")[:2])
    told = Told(["One."])
    await ask(told)
    ((prompt, params),) = told.asked
    assert params.max_tokens == told.context_length - len(prompt)


async def test_calls_are_text_where_none_is_wanted_and_the_tools_are_told_of_all_the_same():
    told, usual = Told([BOTH]), Told([BOTH])
    (choice,) = (await ask(told, tool_choice="none")).choices
    await ask(usual, tool_choice="auto")
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (BOTH, None, "stop")
    assert choice.art_mcp == {"malformed": []}
    assert told.asked[0][0] == usual.asked[0][0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"top_p": 0.9}, "full distribution"),
        ({"frequency_penalty": 0.5}, "full distribution"),
        ({"logit_bias": {"5": 100}}, "full distribution"),
        ({"extra_body": {"top_k": 5}}, "full distribution"),
        ({"logprobs": True, "top_logprobs": 2}, "only the sampled token"),
        ({"tool_choice": "required"}, "cannot be made sure of"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "cannot be made sure of"),
        ({"parallel_tool_calls": False}, "not constrained"),
        ({"response_format": {"type": "json_object"}}, "not constrained"),
        ({"reasoning_effort": "low"}, "rendered as it is"),
        ({"extra_body": {"functions": [{"name": "f"}]}}, "use tools"),
        ({"extra_body": {"guided_regex": "a+"}}, "unknown field 'guided_regex'"),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, "rendered as it is"),
        ({"extra_body": {"moderation": {"model": "m"}}}, "nothing is moderated"),
        ({"messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}, USER]}, "tool_calls"),
        ({"extra_body": {"top_p": True}}, "top_p is not supported"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 0.001}, "greedy"),
        ({"n": 0}, "n: "),
        ({"n": True}, "n: "),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [LOOK, LOOK]}, "same name"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "only text"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_cannot_be_done_is_refused_with_the_reason(options, word):
    told = Told(["a"])
    with pytest.raises(BadRequestError, match=word) as refusal:
        await ask(told, **options)
    assert refusal.value.type == "invalid_request_error"
    assert told.asked == []


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"], "user": "me", "store": False, "metadata": {"a": "b"}},
        {"extra_body": {"top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "top_logprobs": 0, "reasoning_effort": None}},
        {"tools": None, "tool_choice": "auto", "temperature": 0, "stop": None},
        {"extra_body": {"prompt_cache_options": {"ttl": "1h"}, "chat_template_kwargs": {}}},
        {"tools": [{**LOOK, "function": {**LOOK["function"], "strict": True}}]},
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_changes_nothing_is_taken(options):
    assert (await ask(Told(["a"]), **options)).choices[0].message.content == "a"


async def test_instructions_may_come_from_a_developer_and_in_parts():
    told = Told(["a"])
    for said in (
        {"role": "system", "content": "You add."},
        {"role": "developer", "content": "You add."},
        {"role": "developer", "content": [{"type": "text", "text": "You "}, {"type": "text", "text": "add."}]},
    ):
        await ask(told, messages=[said, USER])
    assert len({prompt for prompt, _ in told.asked}) == 1
    assert "You add." in tokenizer().decode(told.asked[0][0])


async def test_what_is_not_served_is_refused_with_what_is():
    async with direct(voice_of(Told(["a"]))) as (client, _):
        for ask_for in (
            lambda: client.responses.create(model="told", input="Hello"),
            lambda: client.completions.create(model="told", prompt="Hello"),
            lambda: client.with_options(base_url="http://localhost").chat.completions.create(model="told", messages=[USER]),
        ):
            with pytest.raises(NotFoundError, match=r"there are /v1/chat/completions and .* base_url ends with /v1"):
                await ask_for()
        with pytest.raises(NotFoundError, match="no model 'Qwen/Qwen3-4B'; there is told, told@0"):
            await client.models.retrieve("Qwen/Qwen3-4B")


class Add(BaseModel):
    """Adds."""

    a: int
    b: int


async def test_the_parse_helper_of_the_client_reads_calls_and_takes_those_that_do_not_fit_for_text():
    tools = [pydantic_function_tool(Add, name="add")]
    async with direct(voice_of(Told([calls(ADD), UNFIT]))) as (client, _):
        fit = await client.chat.completions.parse(model="told", messages=[USER], tools=tools)
        unfit = await client.chat.completions.parse(model="told", messages=[USER], tools=tools)
    assert fit.choices[0].message.tool_calls[0].function.parsed_arguments == Add(a=2, b=3)
    assert (unfit.choices[0].message.content, unfit.choices[0].message.tool_calls) == (UNFIT, None)


async def test_a_conversation_that_fills_the_context_is_refused():
    told = Told(["a"], context_length=20)
    with pytest.raises(BadRequestError, match="context of 20 leaves no room") as refusal:
        await ask(told)
    assert (refusal.value.code, told.asked) == ("context_length_exceeded", [])


class Broken(Told):
    async def sample(self, token_ids, **options):
        raise EngineError("the engine has failed: out of memory")


class Buggy(Told):
    async def sample(self, token_ids, **options):
        if len(self.asked) == 1:  # the second time
            raise RuntimeError("the secret of line 5")
        return await super().sample(token_ids, **options)


class Unspeakable(TemplateDialect):
    """A dialect that fails when an answer is written."""

    def spelling(self, token_id):
        raise RuntimeError("the secret of line 5")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_is_a_500_in_the_same_shape_logged_once_and_the_next_request_is_answered(stream, caplog):
    own = dialect()
    mute = Unspeakable(own._tokenizer, own._template, stop_token_ids=own.stop_token_ids)
    options = {"model": "told", "messages": [USER], "stream": stream, "logprobs": True}
    for voice, good in ((voice_of(Buggy(["a"])), 1), (Voice(Told(["a"]), mute), 0)):
        caplog.clear()
        async with opened(voice) as (client, _):
            for _ in range(good):
                await client.chat.completions.create(**options)
            with pytest.raises(InternalServerError) as failure:
                await client.chat.completions.create(**options)
            assert (await client.models.list()).data
        assert failure.value.status_code == 500
        assert failure.value.body == {
            "message": "a bug in this endpoint: its log says which",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
        (record,) = caplog.records
        assert "the secret of line 5" in str(record.exc_info[1])


async def test_an_engine_that_fails_is_the_servers_fault():
    with pytest.raises(InternalServerError, match="out of memory") as refusal:
        await ask(Broken(["a"]), n=2)
    assert (refusal.value.status_code, refusal.value.code) == (503, "engine_failed")
