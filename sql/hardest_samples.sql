-- hardest_samples: which completions surprise the teacher most, per token.
--
-- columns     sample_id, task, origin, split: of the sample
--             tokens: number of completion tokens
--             nats_per_token (nats): cross-entropy under the teacher, the mean of -logprob
--             perplexity: its exponential
--             entropy (nats): mean of the teacher's distribution, a lower bound
--             prompt_end, completion_start: the last and the first 60 characters
-- example     SELECT * FROM hardest_samples WHERE origin = 'given' LIMIT 10
CREATE OR REPLACE VIEW hardest_samples AS
SELECT
    sample_id, task, origin, split, completion_tokens AS tokens,
    round(-list_avg(token_logprobs), 3) AS nats_per_token,
    round(exp(-list_avg(token_logprobs)), 2) AS perplexity,
    round(list_avg(entropies), 3) AS entropy,
    right(prompt, 60) AS prompt_end, left(completion, 60) AS completion_start
FROM samples ORDER BY nats_per_token DESC, sample_id;
COMMENT ON VIEW hardest_samples IS 'the completions that surprise the teacher most';
