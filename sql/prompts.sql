-- prompts: one row a prompt, with how the teacher's own answers to it did: what kd grpo chooses from.
--
-- columns  split, source, task, language, prompt_id, group_id, prompt, prompt_ids, reference, verifier; samples: the teacher's own
--          answers; judged: those with a reward; success: mean reward of them, null if none; traces: ids of right answers, given
--          ones too
-- example  SELECT count(*) AS prompts, avg(success) FROM prompts WHERE success > 0 AND success < 1
CREATE OR REPLACE VIEW prompts AS
SELECT
    split, source, any_value(task) AS task, any_value(language) AS language,
    prompt_id, any_value(group_id) AS group_id, any_value(prompt) AS prompt, any_value(prompt_ids) AS prompt_ids,
    any_value(reference) AS reference, any_value(verifier) AS verifier,
    count(*) FILTER (origin = 'sampled') AS samples,
    count(reward) FILTER (origin = 'sampled') AS judged,
    avg(reward) FILTER (origin = 'sampled') AS success,
    coalesce(list(completion_ids ORDER BY sample_id) FILTER (reward = 1), []) AS traces
FROM samples GROUP BY split, source, prompt_id;
COMMENT ON VIEW prompts IS 'one row a prompt, with how the teacher''s own answers did';
