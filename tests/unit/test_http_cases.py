"""Public bugs of other servers, by the numbers that docstrings call "Case N": each has a test here that sees it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

CASES: dict[int, tuple[str, ...]] = {
    # A. Text decoding and stop strings
    1: (
        "api/test_stream.py::test_stream_folded_equals_the_whole_answer",
        "api/test_real_model.py::test_stream_adds_up_to_the_plain_answer",
    ),
    2: (
        "api/test_completions.py::test_completion_streamed_folds_to_the_answer",
        "api/test_real_model.py::test_stream_adds_up_to_the_plain_answer",
    ),
    4: (
        "api/test_stream.py::test_stream_leaks_nothing_of_a_stop_string",
        "api/test_real_model.py::test_stop_string_never_leaks",
    ),
    5: (
        "api/test_stream.py::test_stream_releases_held_text",
        "api/test_chat.py::test_chat_releases_held_text_that_is_no_stop_string",
    ),
    7: ("unit/test_output_parsers.py::test_reasoning_is_split_wherever_the_tag_is_cut",),
    # B. Stream framing, finish_reason, usage
    8: (
        "api/test_chat.py::test_chat_finish_reason_says_why_it_ended",
        "api/test_stream.py::test_stream_has_exactly_one_finish_reason_on_its_last_choice",
    ),
    9: ("api/test_stream.py::test_stream_chunks_carry_every_required_key",),
    10: ("api/test_choices.py::test_choices_streamed_fold_to_the_whole_answer",),
    12: (
        "api/test_stream.py::test_stream_has_no_usage_unless_asked",
        "api/test_stream.py::test_stream_has_usage_once_when_asked",
    ),
    13: ("api/test_stream.py::test_stream_ends_with_one_done_and_nothing_after",),
    15: (
        "api/test_stream.py::test_stream_validates_before_the_headers",
        "api/test_stream.py::test_stream_tells_a_late_error_as_an_event",
        "api/test_openai_client.py::test_openai_client_raises_an_error_of_a_stream",
    ),
    17: (
        "api/test_load_wait.py::test_load_wait_sends_comments_to_a_waiting_stream",
        "api/test_stream.py::test_stream_sends_comments_until_a_late_first_token",
    ),
    # C. Messages and templates
    18: (
        "api/test_conversation.py::test_history_of_calls_reaches_the_template",
        "unit/test_template_limits.py::test_template_gets_null_content_as_it_wants_it",
    ),
    19: ("api/test_conversation.py::test_text_parts_are_joined_in_every_role",),
    20: (
        "api/test_conversation.py::test_part_that_is_no_text_is_refused_by_place",
        "api/test_image_input.py::test_image_is_refused_by_its_place",
    ),
    22: (
        "api/test_conversation.py::test_template_refusal_reaches_the_caller_in_its_words",
        "unit/test_template_limits.py::test_refusal_keeps_the_templates_words_unless_folding_is_on",
    ),
    24: (
        "api/test_conversation.py::test_switches_are_never_a_template_and_always_small",
        "api/test_conversation.py::test_switches_reach_the_template",
        "api/test_conversation.py::test_template_of_a_request_is_refused",
    ),
    26: ("engine/test_control_tokens.py::test_control_tokens_in_messages_are_text_to_the_real_tokenizer",),
    27: (
        "api/test_errors.py::test_errors_of_a_body_name_the_field",
        "api/test_chat.py::test_chat_keeps_nul_and_line_separators",
    ),
    # D. Limits and sampling values
    28: (
        "api/test_chat.py::test_chat_refuses_a_prompt_beyond_the_context",
        "api/test_real_model.py::test_prompt_beyond_the_context_is_refused_with_both_numbers",
    ),
    29: (
        "api/test_chat.py::test_chat_max_tokens_null_means_the_rest_of_the_context",
        "api/test_chat.py::test_chat_max_tokens_refuses_what_is_no_count",
        "api/test_chat.py::test_chat_max_tokens_beyond_the_context_says_the_numbers",
    ),
    30: (
        "api/test_chat.py::test_chat_temperature_takes_its_range",
        "api/test_chat.py::test_chat_temperature_refuses_the_rest",
    ),
    31: (
        "api/test_logprobs.py::test_sampling_fields_out_of_range_are_refused_before_the_headers",
        "api/test_real_model.py::test_logit_bias_and_stop_tokens_bind",
    ),
    32: ("api/test_real_model.py::test_seeded_answers_are_equal_alone_and_together",),
    33: (
        "api/test_logprobs.py::test_logprobs_spell_the_content",
        "api/test_real_model.py::test_logprobs_of_constrained_text_are_numbers",
    ),
    35: (
        "engine/test_engine.py::test_row_of_nan_fails_alone",
        "engine/test_alone.py::test_fallback_row_of_nan_fails_alone",
        "api/test_stream.py::test_stream_and_whole_answer_tell_broken_logits_alike",
    ),
    # E. Tools and structured output
    36: (
        "unit/test_output_parsers.py::test_recorded_outputs_mean_the_same_cut_into_characters",
        "unit/test_output_parsers.py::test_recorded_outputs_mean_the_same_cut_in_two_anywhere",
    ),
    37: ("api/test_tools.py::test_calls_have_increasing_indexes_and_one_is_enough_where_one_was_asked_for",),
    40: (
        "api/test_structured_refusals.py::test_wrong_constraint_is_refused_by_name",
        "unit/test_grammar.py::test_wrong_schemas_are_the_callers_error",
    ),
    # F. Cancellation, concurrency, shutdown
    42: (
        "api/test_disconnect.py::test_disconnect_frees_the_slot",
        "api/test_real_model.py::test_client_that_leaves_frees_its_slot",
    ),
    44: ("api/test_disconnect.py::test_disconnect_of_half_the_streams_harms_no_other",),
    46: (
        "api/test_drain.py::test_drain_finishes_a_running_stream_and_exits_0",
        "api/test_drain.py::test_drain_sends_the_queue_elsewhere",
        "api/test_drain.py::test_drain_does_not_wait_for_a_client_that_reads_nothing",
    ),
    47: (
        "api/test_disconnect.py::test_disconnect_of_nobody_and_a_full_queue_give_429",
        "api/test_load_wait.py::test_load_wait_limits_the_queue_while_loading",
    ),
    # G. Server surface
    48: (
        "api/test_health.py::test_health_answers_head_without_a_body",
        "api/test_models.py::test_models_and_health_answer_head_without_a_body",
    ),
    50: ("api/test_auth.py::test_auth_closes_every_route_but_the_open_ones",),
    51: (
        "api/test_models.py::test_models_are_found_by_names_with_slashes",
        "api/test_models.py::test_models_unknown_in_a_request_are_404_with_the_right_name",
    ),
    52: ("api/test_errors.py::test_errors_that_nobody_expects_keep_the_connection",),
    53: (
        "api/test_health.py::test_health_answers_while_a_load_blocks_its_thread",
        "api/test_health.py::test_health_answers_while_a_long_prompt_is_tokenised",
    ),
    # I. Configuration
    59: ("api/test_errors.py::test_errors_name_an_unsupported_field",),
}


@pytest.mark.parametrize("number", CASES)
def test_case_has_tests_that_are_there_and_check_something(number: int) -> None:
    for place in CASES[number]:
        file, _, name = place.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        [function] = [node for node in tree.body if isinstance(node, FUNCTIONS) and node.name == name]
        checks = [node for node in ast.walk(function) if isinstance(node, ast.Assert)]
        assert checks or "pytest.raises" in ast.unparse(function), f"{place} asserts nothing"
