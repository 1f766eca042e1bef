"""Harmony (gpt-oss): messages with a header each; the channel says what is reasoning, and the recipient what a call."""

from __future__ import annotations

import re

from serve.chat.output.parser import OutputParser
from serve.chat.output.parts import Call, arguments_text, parse_json
from serve.chat.output.reader import Markers, Reading

_START, _MESSAGE, _CHANNEL = "<|start|>", "<|message|>", "<|channel|>"
_HEAD_END = Markers(_MESSAGE, "<|end|>", "<|call|>", "<|return|>")
_BODY_END = Markers("<|end|>", "<|call|>", "<|return|>", _START)
_TEXT_END = Markers("<|end|>", "<|return|>", _START)
_RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.-]+)")
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_MAX_HEADER_CHARS = 1024


class HarmonyParser(OutputParser):
    """The prompt ends in the middle of the first header."""

    always = True
    marks = (_START, _MESSAGE, _CHANNEL, "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")

    @classmethod
    def opens_reasoning(cls, prompt: str) -> bool:
        """Never: the model writes each header itself."""
        del prompt
        return False

    def _read(self) -> Reading[None]:
        reader, is_first = self.reader, True
        while True:
            reader.start_record()
            header, marker = yield from reader.text_until(_HEAD_END)
            is_plain = is_first and _CHANNEL not in header and not _RECIPIENT.search(header)
            if marker != _MESSAGE or is_plain or len(header) > _MAX_HEADER_CHARS:
                if (is_plain or header.strip()) and not (self.is_truncated and _CHANNEL in header):
                    self.say(header if is_plain else reader.record)
            else:
                marker = yield from self._read_message(header)
            if marker is None:
                return
            is_first = False

    def _read_message(self, header: str) -> Reading[str | None]:
        reader, found = self.reader, _CHANNEL_NAME.search(header)
        channel, recipient = found[1] if found else "final", _RECIPIENT.search(header)
        if recipient is not None:
            text, marker = yield from reader.json_until(_BODY_END)
            arguments = _arguments(text)
            is_known = not self.reads_calls or recipient[1] in self.tools or not len(self.tools)
            if arguments is not None and is_known and self.reads_calls:
                self.give([Call(recipient[1], arguments)])
            elif not self.is_truncated:
                self.say(text)
            return marker
        if channel == "analysis":
            self.is_reasoning = True
            marker = yield from reader.until(_TEXT_END, self._think)
            self.is_reasoning = False
            return marker
        return (yield from reader.until(_TEXT_END, self.say))


def _arguments(text: str) -> str | None:
    try:
        return arguments_text(parse_json(text) if text.strip() else None)
    except ValueError:
        return None
