-- shards: one row a shard file.
--
-- columns  file; split; samples; tokens (completion tokens); candidates; bytes on disk (compressed, without footer)
-- example  SELECT * FROM shards
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
COMMENT ON VIEW shards IS 'one row a shard file, with its samples, tokens and bytes';
