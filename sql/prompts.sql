-- prompts: how the teacher's own answers to each prompt did, one row per prompt; kd grpo chooses from it.
--
-- columns     split, source, task, language, prompt_id, group_id, prompt, prompt_ids, reference, verifier: of the prompt
--             judges: every pair of verifier and reference among its rows
--             samples: number of the teacher's own answers
--             judged: number of those with a reward
--             success (share): mean reward of those, null without any
--             traces: token ids of all right answers, given ones too
-- example     SELECT count(*) AS prompts, avg(success) FROM prompts WHERE success > 0 AND success < 1
CREATE OR REPLACE VIEW prompts AS
WITH answers AS (
    SELECT
        coalesce(min(sample_id) FILTER (verifier IS NOT NULL), min(sample_id)) AS sample_id,
        list(DISTINCT {verifier: verifier, reference: reference} ORDER BY {verifier: verifier, reference: reference})
            FILTER (verifier IS NOT NULL) AS judges,
        count(*) FILTER (origin = 'sampled') AS samples,
        count(reward) FILTER (origin = 'sampled') AS judged,
        avg(reward) FILTER (origin = 'sampled') AS success
    FROM samples GROUP BY split, source, prompt_id
), solved AS (
    SELECT split, source, prompt_id, list(completion_ids ORDER BY sample_id) AS traces
    FROM samples WHERE reward = 1 GROUP BY ALL
)
SELECT
    split, source, task, language, prompt_id, group_id, prompt, prompt_ids, reference, verifier,
    coalesce(judges, []) AS judges, answers.samples, judged, success, coalesce(traces, []) AS traces
FROM samples JOIN answers USING (sample_id) LEFT JOIN solved USING (split, source, prompt_id);
COMMENT ON VIEW prompts IS 'one row per prompt, with how the teacher''s own answers did';
