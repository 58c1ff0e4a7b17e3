-- shards: the shard files, one row per file.
--
-- columns     file, split: the shard, and the split that it belongs to
--             samples: number of samples
--             tokens: number of completion tokens
--             candidates: number of candidates of all tokens
--             bytes: compressed size of the columns, without the footer
-- example     SELECT * FROM shards
CREATE OR REPLACE VIEW shards AS
WITH sizes AS (
    SELECT parse_filename(file_name) AS file, sum(total_compressed_size) AS bytes
    FROM parquet_metadata(coalesce(getvariable('shards'), [coalesce(getvariable('cache'), '.') || '/data/*.parquet']))
    GROUP BY ALL
), counts AS (
    SELECT
        file, min(split) AS split, count(*) AS samples, sum(completion_tokens) AS tokens,
        sum(list_sum(list_transform(candidate_ids, lambda ids: len(ids)))) AS candidates
    FROM samples
    GROUP BY file
)
SELECT file, split, samples, tokens, candidates, bytes
FROM counts LEFT JOIN sizes USING (file) ORDER BY file;
COMMENT ON VIEW shards IS 'one row per shard file, with its samples, tokens and bytes';
