"""What a person is shown of a conversation."""

from art_mcp.wiring.play import spoken


def test_a_policys_thoughts_are_shown_before_what_it_says_and_calls():
    call = {"type": "function", "id": "call00000", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm?", "tool_calls": [call]},
        {"role": "assistant", "content": "", "reasoning_content": "And so on"},
    ]
    assert spoken(messages) == [
        ("user", "Why?"),
        ("policy", "thinks Hm?"),
        ("policy", 'calls add({"a": 1})'),
        ("policy", "thinks And so on"),
        ("policy", ""),
    ]
