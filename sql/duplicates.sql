-- duplicates: which samples count twice, or leak from one split into another.
--
-- columns     kind: completion (the same completion of the same prompt, token for token), split
--               (one prompt in several splits), or group (one prompt under several group ids in
--               one split)
--             n: number of samples concerned
--             sample_ids: their ids
-- note        An empty result is good news. A given and a sampled completion of one prompt are
--             duplicates only if they are equal.
-- example     SELECT kind, count(*) AS cases, sum(n) AS samples FROM duplicates GROUP BY kind
CREATE OR REPLACE VIEW duplicates AS
-- Hashes first, so that DuckDB holds one number per sample; only samples whose hashes repeat are compared in full.
WITH twice AS (
    SELECT hash(prompt_id, completion_ids) AS hash FROM samples GROUP BY hash HAVING count(*) > 1
), astray AS (
    SELECT hash(prompt_id) AS hash FROM samples
    GROUP BY hash HAVING min(hash(split, group_id)) <> max(hash(split, group_id))
), completions AS (
    SELECT 'completion' AS kind, count(*) AS n, list(sample_id ORDER BY sample_id) AS sample_ids
    FROM samples SEMI JOIN twice ON hash(prompt_id, completion_ids) = twice.hash
    GROUP BY prompt_id, completion_ids HAVING count(*) > 1
), prompts AS (
    SELECT
        if(count(DISTINCT split) > 1, 'split', 'group') AS kind,
        count(*) AS n,
        list(sample_id ORDER BY sample_id) AS sample_ids
    FROM samples SEMI JOIN astray ON hash(prompt_id) = astray.hash
    GROUP BY prompt_id HAVING count(DISTINCT split) > 1 OR count(DISTINCT group_id) > 1
)
FROM completions UNION ALL FROM prompts ORDER BY kind, n DESC, sample_ids;
COMMENT ON VIEW duplicates IS 'samples that count twice, or leak from one split into another';
