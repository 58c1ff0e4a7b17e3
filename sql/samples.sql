-- samples: the samples of the shards, one row per prompt and completion.
--
-- columns     sample_id, prompt_id, group_id: of the sample, its prompt, and the problem it belongs to
--             source, split, task, language: where it comes from
--             prompt, completion, reference, prompt_ids, completion_ids: texts and token ids
--             prompt_tokens, completion_tokens: numbers of tokens
--             token_logprobs (nats), token_ranks: a value per completion token
--             tail_logprobs (nats), entropies (nats), completion_mask: a value per completion token
--             candidate_ids, candidate_logprobs (nats): a list per completion token, best first
--             origin, sample_index, seed, finish_reason: given or sampled, and how it was sampled
--             verifier: how to check an answer, as JSON
--             reward: 1 if right, 0 if wrong; of kd verify-answers, else of the capture
--             file: the shard that holds the sample
--             file_row_number: its row in that shard, from 0
-- example     SELECT source, split, count(*), avg(reward) FROM samples GROUP BY ALL
CREATE OR REPLACE VIEW samples AS
SELECT
    shards.* EXCLUDE (filename, file_row_number) REPLACE (coalesce(rewards.reward, shards.reward) AS reward),
    parse_filename(shards.filename) AS file, shards.file_row_number
FROM read_parquet(
    coalesce(getvariable('shards'), [coalesce(getvariable('cache'), '.') || '/data/*.parquet']),
    filename = true, file_row_number = true
) AS shards
LEFT JOIN rewards ON rewards.sample_id = shards.sample_id;
COMMENT ON VIEW samples IS 'one row per sample: a prompt and one completion';
