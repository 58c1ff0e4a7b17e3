-- samples: one row a sample (a prompt and one completion), the shards as they are.
--
-- columns  every column of the cache format: ids and text, prompt_tokens, completion_tokens, the per-token lists
--          (token_logprobs, token_ranks, candidate_ids, candidate_logprobs, tail_logprobs, entropies: nats), origin,
--          finish_reason, reward; and file, the shard it is in
-- example  SELECT source, split, count(*) FROM samples GROUP BY ALL
CREATE OR REPLACE VIEW samples AS
SELECT * EXCLUDE (filename, file_row_number), parse_filename(filename) AS file, file_row_number
FROM read_parquet(coalesce(getvariable('cache'), '.') || '/data/*.parquet', filename = true, file_row_number = true);
COMMENT ON VIEW samples IS 'one row a sample: a prompt and one completion';
