-- disagreements: where the teacher's best token is not the completion's own, most confident first.
--
-- columns     sample_id, source, split, task, origin: of the sample
--             position: place in the completion, from 1
--             before: the five tokens before
--             text, probability: the completion's own token, and the teacher's probability of it
--             best, best_probability: the teacher's best token, and its probability
-- example     SELECT before, text, probability, best, best_probability FROM disagreements
--             WHERE origin = 'given' LIMIT 10
CREATE OR REPLACE VIEW disagreements AS
WITH unnested AS (
    SELECT
        sample_id, source, split, task, origin,
        generate_subscripts(completion_ids, 1) AS position,
        unnest(completion_ids) AS token_id,
        unnest([NULL] || completion_ids) AS id_1,  -- the token before, then the one before that, ...
        unnest([NULL, NULL] || completion_ids) AS id_2,
        unnest([NULL, NULL, NULL] || completion_ids) AS id_3,
        unnest([NULL, NULL, NULL, NULL] || completion_ids) AS id_4,
        unnest([NULL, NULL, NULL, NULL, NULL] || completion_ids) AS id_5,
        unnest(token_logprobs) AS logprob,
        unnest(list_transform(candidate_ids, lambda ids: ids[1])) AS best_id,
        unnest(list_transform(candidate_logprobs, lambda logprobs: logprobs[1])) AS best_logprob
    FROM samples
)
SELECT
    sample_id, source, split, task, origin, position,
    nullif(concat(before_5.text, before_4.text, before_3.text, before_2.text, before_1.text), '') AS before,
    given.text, exp(logprob) AS probability, best.text AS best, exp(best_logprob) AS best_probability
FROM unnested
LEFT JOIN vocab AS given USING (token_id)
LEFT JOIN vocab AS best ON best.token_id = best_id
LEFT JOIN vocab AS before_1 ON before_1.token_id = id_1
LEFT JOIN vocab AS before_2 ON before_2.token_id = id_2
LEFT JOIN vocab AS before_3 ON before_3.token_id = id_3
LEFT JOIN vocab AS before_4 ON before_4.token_id = id_4
LEFT JOIN vocab AS before_5 ON before_5.token_id = id_5
WHERE position IS NOT NULL AND token_id <> best_id
ORDER BY best_logprob DESC, sample_id, position;
COMMENT ON VIEW disagreements IS 'where the teacher''s best token is not the token given, most confident first';
