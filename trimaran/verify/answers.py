"""Checks of what is answered: the stream's form and pace, usage, greedy tokens."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

from trimaran.verify.outcome import Outcome, failed, passed, skipped
from trimaran.verify.target import COMPLETIONS, Stream, Target

PROMPT = "Write a long story about a boat that crosses an ocean, its crew, the weather and the stars."
STREAM_TOKENS = 96
JUDGED_S = 0.3
"""A stream that takes less beyond its first token is too quick for its pace to be judged."""
MOMENT_S = 0.005
"""Events that are closer than this came together."""
FEW_MOMENTS = 8
MANY_PIECES = 32
SAME_CHARS = 24
"""Greedy texts of one model agree at least so far.  Later a rounding may turn a close decision: in another precision,
or in the same one where requests share batches and prefixes."""


def check_stream(target: Target) -> tuple[Outcome, Stream]:
    """Every event can be read, the last chunk says why it ended, and ``[DONE]`` comes last."""
    stream = target.stream(target.chat(PROMPT, STREAM_TOKENS))
    name, defect = "stream", ""
    if stream.status != 200:
        defect = f"a stream was answered with {stream.status}"
    elif not stream.content_type.startswith("text/event-stream"):
        defect = f"a stream came as {stream.content_type or 'no type'}, not text/event-stream"
    elif stream.broken:
        defect = stream.broken
    elif not stream.is_done:
        defect = (
            "it ends without [DONE]: clients wait for it or report a broken answer; something cuts the stream short"
        )
    elif stream.finish_reason not in ("stop", "length"):
        defect = f"its last chunk has finish_reason {stream.finish_reason!r}"
    elif wrong := {chunk.get("model") for chunk in stream.chunks} - {target.model}:
        defect = f"its chunks name the model {wrong}, and {target.model} was asked for"
    if defect:
        return failed(name, defect), stream
    return passed(name, f"{len(stream.pieces)} pieces of text, then [DONE]"), stream


def check_pace(target: Target, stream: Stream) -> Outcome:
    """Tokens come as they are made.  A proxy that buffers delivers them at once, at the end or in blocks.

    An answer of one token tells when the first token of a long one could have come.
    """
    name = "pace"
    if not stream.times_s:
        return skipped(name, "the stream had no text")
    first = target.stream(target.chat(PROMPT, 1))
    possible_s = first.total_s
    moments = [stream.times_s[0]]
    for at in stream.times_s[1:]:
        if at - moments[-1] > MOMENT_S:
            moments.append(at)
    gaps = [after - before for before, after in pairwise(moments)]
    figures = {
        "first_token_s": round(stream.times_s[0], 4),
        "possible_first_token_s": round(possible_s, 4),
        "total_s": round(stream.total_s, 4),
        "moments": len(moments),
        "largest_gap_s": round(max(gaps, default=0.0), 4),
        "median_gap_s": round(median(gaps), 4) if gaps else 0.0,
    }
    judged_s = stream.total_s - possible_s
    if judged_s < JUDGED_S:
        return skipped(name, f"{stream.total_s:.2f} s is too quick to tell streaming from buffering", **figures)
    if stream.times_s[0] - possible_s > 0.6 * judged_s:
        return failed(
            name,
            f"buffered: the first token came after {stream.times_s[0]:.2f} s, near the end ({stream.total_s:.2f} s), "
            f"though an answer of one token takes {possible_s:.2f} s. Turn off buffering in the proxy in front",
            **figures,
        )
    if len(stream.pieces) >= MANY_PIECES and len(moments) < FEW_MOMENTS:
        return failed(
            name,
            f"buffered in blocks: {len(stream.pieces)} pieces came in {len(moments)} bursts. "
            "Turn off buffering and compression in the proxy in front",
            **figures,
        )
    return passed(
        name, f"first token after {stream.times_s[0]:.2f} s, largest gap {figures['largest_gap_s']:.2f} s", **figures
    )


def check_usage(target: Target, stream: Stream) -> Outcome:
    """Tokens add up, and a plain answer is the stream's, as far as greedy texts of one model agree."""
    name = "usage"
    answer = target.ask("POST", COMPLETIONS, json=target.chat(PROMPT, STREAM_TOKENS))
    if answer.status_code != 200:
        return failed(name, f"a plain request was answered with {answer.status_code}")
    plain = answer.json()
    usage, streamed = plain.get("usage"), stream.usage
    if not usage or not streamed:
        return failed(name, f"no usage in {'the plain answer' if not usage else 'the stream (include_usage)'}")
    for one in (usage, streamed):
        if one["prompt_tokens"] + one["completion_tokens"] != one["total_tokens"]:
            return failed(name, "prompt and completion tokens do not add up to total_tokens", usage=one)
    if plain["choices"][0]["finish_reason"] == "length" and usage["completion_tokens"] != STREAM_TOKENS:
        return failed(name, f"{STREAM_TOKENS} tokens were asked for and reached, and usage counts others", usage=usage)
    text = plain["choices"][0]["message"]["content"] or ""
    if text[:SAME_CHARS] != stream.text[:SAME_CHARS]:
        return failed(name, f"the same greedy request begins {text[:40]!r} plain, {stream.text[:40]!r} streamed")
    counts = ("prompt_tokens", "completion_tokens") if text == stream.text else ("prompt_tokens",)
    if any(usage[count] != streamed[count] for count in counts):
        return failed(name, "the stream's usage differs from the plain answer's", plain=usage, stream=streamed)
    return passed(name, f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens, plain and streamed")
