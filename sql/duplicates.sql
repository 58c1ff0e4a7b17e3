-- duplicates: samples that would be counted twice, or leak from one split into another.
--
-- columns  kind; n: samples concerned; sample_ids. Kinds: completion: the same completion of the same prompt, token for
--          token; split: one prompt in several splits; group: one prompt under several group ids, all in one split
-- note     no row is good news; given and sampled completions of one prompt are no duplicates unless they are equal
-- example  SELECT kind, count(*) AS cases, sum(n) AS samples FROM duplicates GROUP BY kind
CREATE OR REPLACE VIEW duplicates AS
WITH twice AS (  -- those with the same hash, and then the same: what is held of every sample is a number
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
COMMENT ON VIEW duplicates IS 'samples that would be counted twice, or leak from one split into another';
