"""One rollout, token for token, over a real dialect and a tool server in this process."""

from itertools import pairwise

import anyio
import pytest

from art_mcp.agent.rollout import rollout
from art_mcp.errors import EngineError
from art_mcp.sampling.scripted import ScriptedSampler
from art_mcp.types import Completion, Limits, Malformed, MalformedKind, Scenario, Span, StopReason, ToolCall
from tests.agent.players import USER, Desk, calls, desk_tools, dialect, text_of, tokenizer, tokens, whole
from tests.clocks import skip

pytestmark = pytest.mark.anyio

SCENARIO = Scenario("one", USER["content"])
ADD = ("add", {"a": 2, "b": 3})
BROKEN = '<tool_call>\n{"name": "add", "arguments": {"a": 2,\n</tool_call>'
UNKNOWN = '<tool_call>\n{"name": "ad", "arguments": {}}\n</tool_call>'

OWN_FORM = {
    "an answer at once": ["5"],
    "one result": [calls(ADD), "5"],
    "a chain": [calls(ADD), calls(("add", {"a": 5, "b": -1})), "The sum is 4."],
    "parallel results": [calls(ADD, ("add", {"a": 1, "b": 1}), ("fail", {})), "5 and 2"],
    "text before a call": [f"Let me see.\n{calls(ADD)}", "5"],
    "malformed JSON": [BROKEN, calls(ADD), "5"],
    "an unknown tool": [UNKNOWN, "5"],
    "an empty answer": [""],
    "another script": [calls(("write", {"text": "é 🦩 ٣ <b>"})), "naïve 你好"],
}
ANY_FORM = {
    **OWN_FORM,
    "a malformed call beside a good one": [f"{BROKEN}\n{calls(ADD)}", "5"],
    "other spaces than the template's": ['<tool_call>{"arguments":{"b":3,"a":2},"name":"add"}</tool_call>', "5"],
}


async def play(script, *, desk=None, system="", context=100_000, tools=desk_tools, **limits):
    """The trajectory, the sampler that played it and what transformers renders of it."""
    sampler = ScriptedSampler([turn if isinstance(turn, list) else tokens(turn) for turn in script], context_length=context)
    async with tools(desk) as toolbox:
        trajectory = await rollout(
            SCENARIO, sampler=sampler, dialect=dialect(), toolbox=toolbox, system=system, limits=Limits(**limits)
        )
        return trajectory, sampler, whole(trajectory, toolbox)


def consistent(trajectory, sampler, rendered):
    """Spans, messages and what the sampler saw tell the same story, wherever it ended."""
    before = []
    prompts = iter(sampler.prompts)
    for span in trajectory.spans:
        if span.logprobs is not None:
            assert next(prompts) == tuple(before)
        before += span.token_ids
    assert next(prompts, tuple(before)) == tuple(before)  # a turn that the time limit cut off
    assert trajectory.turns == sum(span.logprobs is not None for span in trajectory.spans)
    assert rendered.startswith(text_of(trajectory))
    return True


@pytest.mark.parametrize("system", ["", "You add."])
@pytest.mark.parametrize("turns", ANY_FORM.values(), ids=list(ANY_FORM))
async def test_every_prompt_is_all_that_came_before_and_only_what_the_policy_wrote_is_trained(turns, system):
    trajectory, sampler, _ = await play(turns, system=system)
    assert trajectory.stop_reason is StopReason.ANSWERED
    policy = [at for at, span in enumerate(trajectory.spans) if span.logprobs is not None]
    assert len(sampler.prompts) == len(policy) == len(turns) == trajectory.turns
    for prompt, at in zip(sampler.prompts, policy, strict=True):
        assert prompt == tuple(token for span in trajectory.spans[:at] for token in span.token_ids)
    written = [tokenizer().decode(trajectory.spans[at].token_ids) for at in policy]
    assert written == [f"{turn}<|im_end|>" for turn in turns]
    assert all(later - earlier == 2 for earlier, later in pairwise(policy))
    assert trajectory.policy_tokens == sum(len(tokens(turn)) for turn in turns)


@pytest.mark.parametrize("system", ["", "You add."])
@pytest.mark.parametrize("turns", OWN_FORM.values(), ids=list(OWN_FORM))
async def test_the_spans_are_what_the_template_would_have_said_up_to_the_last_stop_token(turns, system):
    trajectory, _, rendered = await play(turns, system=system)
    assert text_of(trajectory) + "\n<|im_start|>assistant\n" == rendered
    assert dialect().stop_token_ids >= {trajectory.token_ids[-1]}


@pytest.mark.parametrize("weighed", [calls(ADD), BROKEN, UNKNOWN], ids=["a call", "malformed JSON", "an unknown tool"])
async def test_what_the_policy_only_thinks_of_calling_reaches_no_server_and_is_no_mistake(weighed):
    desk = Desk()
    trajectory, _, _ = await play([f"<think>\nI could write {weighed}, but why?\n</think>\n\n5"], desk=desk)
    assert (trajectory.stop_reason, trajectory.turns, trajectory.uses) == (StopReason.ANSWERED, 1, ())
    assert trajectory.answer == "5"
    assert desk.log == []


async def test_a_thought_that_never_ends_is_no_answer():
    trajectory, _, _ = await play([f"<think>\nIs it 5? {calls(ADD)}"])
    assert (trajectory.stop_reason, trajectory.uses, trajectory.answer) == (StopReason.ANSWERED, (), "")


async def test_a_result_and_an_error_reach_the_policy_in_its_next_prompt():
    trajectory, sampler, _ = await play([calls(ADD, ("fail", {})), "5"])
    second = tokenizer().decode(sampler.prompts[1])
    assert "<tool_response>\n5\n</tool_response>" in second
    assert "not today" in second
    assert (trajectory.tool_errors, trajectory.malformed) == (1, 0)
    assert [use.result.is_error for use in trajectory.uses] == [False, True]
    assert trajectory.answer == "5"


@pytest.mark.parametrize(
    ("turn", "kind", "hint"),
    [
        (BROKEN, MalformedKind.INVALID_JSON, "JSON"),
        (UNKNOWN, MalformedKind.UNKNOWN_TOOL, 'did you mean "add"'),
        ("<tool_call>\n[1]\n</tool_call>", MalformedKind.NOT_AN_OBJECT, "object"),
        ("<tool_call>\n</tool_call>", MalformedKind.EMPTY, "name"),
        (calls(("add", {"a": 2})), MalformedKind.SCHEMA, "b"),
        (calls(("add", {"a": "two", "b": 3})), MalformedKind.SCHEMA, "a"),
    ],
)
async def test_a_malformed_call_is_counted_and_the_policy_is_told_what_to_fix(turn, kind, hint):
    trajectory, sampler, _ = await play([turn, "5"])
    (use,) = trajectory.uses
    assert isinstance(use.call, Malformed)
    assert use.call.kind is kind
    assert (trajectory.malformed, trajectory.tool_errors) == (1, 0)
    told = tokenizer().decode(sampler.prompts[1])[len(tokenizer().decode(sampler.prompts[0])) + len(turn) :]
    assert use.call.error in told
    assert hint in use.call.error


async def test_every_call_of_a_turn_is_answered_in_the_order_written():
    trajectory, sampler, _ = await play([f"{calls(ADD)}\n{UNKNOWN}\n{calls(('add', {'a': 1, 'b': 1}))}", "5"])
    kinds = [type(use.call) for use in trajectory.uses]
    assert kinds == [ToolCall, Malformed, ToolCall]
    assert [use.result.text for use in trajectory.uses][::2] == ["5", "2"]
    tools = [message for message in trajectory.messages if message["role"] == "tool"]
    assert [message["content"] for message in tools] == [use.result.text for use in trajectory.uses]
    (written,) = [message["tool_calls"] for message in trajectory.messages if message.get("tool_calls")]
    assert [message.get("tool_call_id") for message in tools] == [written[0]["id"], None, written[1]["id"]]
    assert written[0]["id"] != written[1]["id"]
    assert [message.get("name") for message in tools] == ["add", None, "add"]
    second = tokenizer().decode(sampler.prompts[1])
    places = [second.index(f"<tool_response>\n{use.result.text}\n</tool_response>") for use in trajectory.uses]
    assert places == sorted(places)


async def test_parallel_calls_are_in_flight_together():
    trajectory, _, _ = await play([calls(("meet", {}), ("meet", {})), "5"])
    assert [use.result.text for use in trajectory.uses] == ["met", "met"]


async def test_calls_that_change_things_are_made_one_after_the_other_in_order():
    desk = Desk()
    slow, quick = ("write", {"text": "first", "pause": 0.05}), ("write", {"text": "second"})
    trajectory, _, _ = await play([calls(slow, ADD, quick), "5"], desk=desk)
    assert desk.log == ["begin first", "end first", "begin second", "end second"]
    assert [use.result.text for use in trajectory.uses] == ["written", "5", "written"]


async def test_a_turn_without_a_stop_token_ends_the_rollout_as_truncated():
    trajectory, *rest = await play([calls(ADD), "one two three four five six seven"], turn_tokens=len(tokens(calls(ADD))))
    assert trajectory.stop_reason is StopReason.TRUNCATED
    assert consistent(trajectory, *rest)
    assert len(trajectory.spans[-1].token_ids) == len(tokens(calls(ADD)))
    assert trajectory.answer == ""


async def test_a_call_that_a_limit_cut_off_is_counted_as_malformed_and_not_made():
    turn = tokens(calls(ADD))
    trajectory, *rest = await play([turn], turn_tokens=len(turn) - 3)
    assert trajectory.stop_reason is StopReason.TRUNCATED
    assert trajectory.malformed == 1
    assert consistent(trajectory, *rest)


async def test_the_turn_limit_ends_after_the_last_calls_were_made():
    desk = Desk()
    trajectory, *rest = await play([calls(("write", {"text": str(n)})) for n in range(5)], desk=desk, turns=2)
    assert trajectory.stop_reason is StopReason.TURN_LIMIT
    assert desk.log == ["begin 0", "end 0", "begin 1", "end 1"]
    assert trajectory.messages[-1]["content"] == "written"
    assert trajectory.spans[-1].logprobs is not None
    assert consistent(trajectory, *rest)


async def test_the_call_limit_ends_before_a_turn_that_would_exceed_it():
    desk = Desk()
    pair = calls(("write", {"text": "a"}), ("write", {"text": "b"}))
    trajectory, *rest = await play([pair, pair, "5"], desk=desk, calls=3)
    assert trajectory.stop_reason is StopReason.CALL_LIMIT
    assert len(desk.log) == 4
    assert consistent(trajectory, *rest)


async def test_malformed_calls_count_towards_the_call_limit_and_are_counted_beyond_it():
    trajectory, *rest = await play([UNKNOWN, BROKEN, "5"], calls=1)
    assert trajectory.stop_reason is StopReason.CALL_LIMIT
    assert trajectory.malformed == 2
    assert consistent(trajectory, *rest)


async def test_the_token_limit_cuts_a_turn_short():
    opening = len((await play(["5"]))[1].prompts[0])
    trajectory, *rest = await play(["one two three four five six seven"], tokens=opening + 4)
    assert trajectory.stop_reason is StopReason.TOKEN_LIMIT
    assert len(trajectory.token_ids) == opening + 4
    assert consistent(trajectory, *rest)


@pytest.mark.parametrize("limit", ["tokens", "context"])
async def test_a_result_that_leaves_no_room_for_a_turn_is_not_added_to_the_tokens(limit):
    turns = [calls(("write", {"text": "x"})), "5"]
    free, sampler, _ = await play(turns)
    for most in (len(sampler.prompts[1]), len(sampler.prompts[1]) - 1):
        trajectory, *rest = await play(turns, **{limit: most})
        assert trajectory.stop_reason is StopReason.TOKEN_LIMIT
        assert trajectory.messages == free.messages[:-1]
        assert trajectory.token_ids == sampler.prompts[0] + trajectory.spans[-1].token_ids
        assert consistent(trajectory, *rest)
    trajectory, *_ = await play(turns, **{limit: len(sampler.prompts[1]) + 1})
    assert len(trajectory.token_ids) == len(sampler.prompts[1]) + 1


@pytest.mark.parametrize("limit", ["tokens", "context"])
async def test_an_opening_that_leaves_no_room_for_a_turn_is_a_failure_and_no_trajectory(limit):
    opening = len((await play(["5"]))[1].prompts[0])
    whose = {"tokens": "Limits.tokens of the environment", "context": "the model's context"}[limit]
    with pytest.raises(EngineError, match=rf"opening has {opening} tokens.*{opening} is the limit \({whose}\)"):
        await play(["5"], **{limit: opening})


async def test_the_time_limit_ends_a_call_that_sleeps():
    trajectory, *rest = await play([calls(("nap", {"seconds": 60})), "5"], seconds=60)
    assert trajectory.stop_reason is StopReason.TIME_LIMIT
    assert trajectory.messages[-1]["role"] == "assistant"
    assert trajectory.uses == ()
    assert trajectory.seconds >= 60
    assert consistent(trajectory, *rest)


class Sleepy(ScriptedSampler):
    """Falls asleep at turn `at`."""

    def __init__(self, turns, at):
        super().__init__(turns)
        self.at = at

    async def sample(self, token_ids, **options) -> Completion:
        done = await super().sample(token_ids, **options)
        if len(self.prompts) > self.at:
            skip(60)
            await anyio.sleep_forever()
        return done


async def sleepy_rollout(at):
    sampler = Sleepy([tokens(calls(ADD)), tokens("5")], at)
    async with desk_tools() as toolbox:
        trajectory = await rollout(SCENARIO, sampler=sampler, dialect=dialect(), toolbox=toolbox, limits=Limits(seconds=60))
        return trajectory, sampler, whole(trajectory, toolbox)


async def test_the_time_limit_ends_a_turn_that_is_being_sampled():
    trajectory, *rest = await sleepy_rollout(1)
    assert trajectory.stop_reason is StopReason.TIME_LIMIT
    assert trajectory.messages[-1]["content"] == "5"
    assert consistent(trajectory, *rest)


async def test_an_engine_that_answers_no_turn_in_time_has_failed():
    with pytest.raises(EngineError, match="no turn was sampled within 60 s"):
        await sleepy_rollout(0)


class Attentive(ScriptedSampler):
    """Keeps what each turn was asked for."""

    def __init__(self, turns):
        super().__init__(turns)
        self.asked = []

    async def sample(self, token_ids, *, params, stop, shared=0):
        self.asked.append((params, stop, shared))
        return await super().sample(token_ids, params=params, stop=stop, shared=shared)


async def asked(**options):
    sampler = Attentive([tokens(calls(ADD)), tokens("5")])
    async with desk_tools() as toolbox:
        trajectory = await rollout(SCENARIO, sampler=sampler, dialect=dialect(), toolbox=toolbox, **options)
    return sampler.asked, trajectory


async def test_every_draw_is_keyed_by_run_step_scenario_rollout_and_turn():
    seeds = [
        [params.seed for params, _, _ in (await asked(key=key, number=number))[0]]
        for key, number in [((0, 0), 0), ((0, 0), 1), ((0, 1), 0), ((1, 0), 0), ((0, 0), 0)]
    ]
    assert seeds[0] == seeds[-1]
    assert len({seed for pair in seeds for seed in pair}) == 8


async def test_a_turn_is_asked_for_with_the_temperature_the_stops_and_the_shared_opening():
    turns, trajectory = await asked(temperature=0.5, limits=Limits(turn_tokens=77))
    for params, stop, shared in turns:
        assert (params.temperature, params.max_tokens, stop) == (0.5, 77, dialect().stop_token_ids)
        assert shared == len(trajectory.spans[0].token_ids)
        assert tokenizer().decode(trajectory.token_ids[:shared]).endswith("<|im_end|>\n<|im_start|>")


class Unshared:
    """A dialect that knows of nothing that conversations share."""

    def __getattr__(self, name):
        return getattr(dialect(), name)

    def opening(self, messages, tools):
        shared, rest = dialect().opening(messages, tools)
        return [], [*shared, *rest]


async def test_an_opening_of_which_nothing_is_shared_is_one_span():
    sampler = Attentive([tokens(calls(ADD)), tokens("5")])
    async with desk_tools() as toolbox:
        trajectory = await rollout(SCENARIO, sampler=sampler, dialect=Unshared(), toolbox=toolbox)
    assert [span.logprobs is None for span in trajectory.spans] == [True, False, True, False]
    assert all(span.token_ids for span in trajectory.spans)
    assert [shared for _, _, shared in sampler.asked] == [0, 0]


async def test_spans_are_of_the_version_that_the_sampler_says():
    trajectory, *_ = await play([calls(ADD), "5"])
    assert [span.policy_version for span in trajectory.spans] == [None, None, 0, None, 0]
    assert trajectory.spans[0] == Span(trajectory.spans[0].token_ids)
