-- hardest_samples: the completions that surprise the teacher most, token for token.
--
-- columns  sample_id, task, origin, split; tokens; nats_a_token: mean -logprob of the completion's tokens (its
--          cross-entropy under the teacher); perplexity; entropy (mean, nats); prompt_end, completion_start: text
-- example  SELECT * FROM hardest_samples WHERE origin = 'given' LIMIT 10
CREATE OR REPLACE VIEW hardest_samples AS
SELECT
    sample_id, task, origin, split, completion_tokens AS tokens,
    round(-list_avg(token_logprobs), 3) AS nats_a_token,
    round(exp(-list_avg(token_logprobs)), 2) AS perplexity,
    round(list_avg(entropies), 3) AS entropy,
    right(prompt, 60) AS prompt_end, left(completion, 60) AS completion_start
FROM samples ORDER BY nats_a_token DESC, sample_id;
COMMENT ON VIEW hardest_samples IS 'the completions that surprise the teacher most';
