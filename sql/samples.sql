-- samples: one row a sample (a prompt and one completion), the shards as they are.
--
-- columns  every column of the cache format: ids and text, prompt_tokens, completion_tokens, the per-token lists
--          (token_logprobs, token_ranks, candidate_ids, candidate_logprobs, tail_logprobs, entropies: nats), origin,
--          finish_reason, reward (1 right, 0 wrong; of kd verify-answers, else of the capture); and file, the shard it is in
-- example  SELECT source, split, count(*), avg(reward) FROM samples GROUP BY ALL
CREATE OR REPLACE VIEW samples AS
SELECT
    shards.* EXCLUDE (filename, file_row_number) REPLACE (coalesce(rewards.reward, shards.reward) AS reward),
    parse_filename(shards.filename) AS file, shards.file_row_number
FROM read_parquet(
    coalesce(getvariable('shards'), [coalesce(getvariable('cache'), '.') || '/data/*.parquet']),
    filename = true, file_row_number = true
) AS shards
LEFT JOIN rewards ON rewards.sample_id = shards.sample_id;
COMMENT ON VIEW samples IS 'one row a sample: a prompt and one completion';
