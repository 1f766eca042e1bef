from __future__ import annotations

import json
import logging
import re
import time

from serve.observe import JsonFormatter, RequestRecord, configure_logging
from serve.settings import LogFormat


def test_record_counts_tokens_and_times():
    record = RequestRecord(request_id="r", method="POST", route="/x", prompt_tokens=5, queue_s=0.25, status=200)
    record.saw_tokens(1)
    time.sleep(0.01)
    record.saw_tokens(2)
    fields = record.as_fields()
    assert (fields["completion_tokens"], fields["queue_ms"], fields["prompt_tokens"]) == (3, 250.0, 5)
    assert fields["itl_ms_mean"] >= 5
    assert fields["total_ms"] >= fields["ttft_ms"] >= 0


def test_record_without_tokens_says_nothing_of_them():
    fields = RequestRecord(request_id="r", method="GET", route="/x").as_fields()
    assert not {"completion_tokens", "ttft_ms", "itl_ms_mean", "prompt_tokens", "finish_reason"} & set(fields)


def test_server_timing_tells_what_is_known():
    record = RequestRecord(request_id="r", method="POST", route="/x")
    assert re.fullmatch(r"total;dur=[\d.]+", record.server_timing())
    record.queue_s = 0.0
    record.saw_tokens(1)
    number = r";dur=[\d.]+"
    assert re.fullmatch(f"queue;dur=0.0, prefill{number}, decode{number}, total{number}", record.server_timing())


def test_json_line_is_one_object_whatever_is_in_it():
    record = logging.makeLogRecord(
        {"name": "serve.x", "levelname": "INFO", "msg": "a\n%s", "args": ("\ud800",), "n": {1}}
    )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "a\n\ud800"
    assert json.loads(line)["n"] == "{1}"


def test_logging_goes_to_stderr_in_the_chosen_format(capsys):
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        for kind in (LogFormat.JSON, LogFormat.AUTO, LogFormat.TEXT):
            configure_logging(kind, "info")
            logging.getLogger("serve.some").info("Hello %s", "you")
        lines = capsys.readouterr().err.splitlines()
    finally:
        root.handlers[:], root.level = handlers, level
    assert json.loads(lines[0])["message"] == json.loads(lines[1])["message"] == "Hello you"
    assert lines[2].endswith("INFO    Hello you")
