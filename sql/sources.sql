-- sources: how much there is of what: tokens and bytes by source, task, origin and split.
--
-- columns  source, task, origin, split; samples; tokens (completion tokens); tokens_a_sample; bytes: the shards' bytes,
--          shared out by tokens
-- example  SELECT * FROM sources WHERE split = 'train'
CREATE OR REPLACE VIEW sources AS
SELECT
    source, task, origin, samples.split, count(*) AS samples,
    sum(completion_tokens)::BIGINT AS tokens,
    round(avg(completion_tokens), 1) AS tokens_a_sample,
    round(sum(bytes * completion_tokens / tokens))::BIGINT AS bytes
FROM samples LEFT JOIN shards USING (file)
GROUP BY ALL ORDER BY ALL;
COMMENT ON VIEW sources IS 'tokens and bytes by source, task, origin and split';
