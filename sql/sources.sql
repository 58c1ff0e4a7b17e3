-- sources: how much of each kind the cache holds, by source, task, origin and split.
--
-- columns     source, task, origin, split: the group
--             samples: number of samples
--             tokens: number of completion tokens
--             tokens_per_sample: mean number of completion tokens
--             bytes: the shards' bytes, shared out in proportion to tokens
-- example     SELECT * FROM sources WHERE split = 'train'
CREATE OR REPLACE VIEW sources AS
SELECT
    source, task, origin, samples.split, count(*) AS samples,
    sum(completion_tokens)::BIGINT AS tokens,
    round(avg(completion_tokens), 1) AS tokens_per_sample,
    round(sum(bytes * completion_tokens / tokens))::BIGINT AS bytes
FROM samples LEFT JOIN shards USING (file)
GROUP BY ALL ORDER BY ALL;
COMMENT ON VIEW sources IS 'tokens and bytes by source, task, origin and split';
