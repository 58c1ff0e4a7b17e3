-- uncertain_tokens: where the teacher is least sure, most uncertain first.
--
-- columns     sample_id: the sample
--             position: place in the completion, from 1
--             before: the three tokens before
--             text: the completion's own token
--             logprob (nats), rank: the teacher's log-probability of that token, and its rank
--             entropy (nats): of the teacher's distribution, a lower bound
--             choices: the three best candidates with their probabilities
-- note        In a `threshold:TAU` cache a position may hold fewer than three candidates, and some
--             of them may have been drawn at random.
-- example     SELECT * FROM uncertain_tokens LIMIT 10
CREATE OR REPLACE VIEW uncertain_tokens AS
WITH unnested AS (
    SELECT
        sample_id,
        generate_subscripts(completion_ids, 1) AS position,
        unnest(completion_ids) AS token_id,
        unnest([NULL] || completion_ids) AS id_1,  -- the token before, then the one before that, ...
        unnest([NULL, NULL] || completion_ids) AS id_2,
        unnest([NULL, NULL, NULL] || completion_ids) AS id_3,
        unnest(token_logprobs) AS logprob,
        unnest(token_ranks) AS rank,
        unnest(entropies) AS entropy,
        unnest(list_transform(candidate_ids, lambda ids: ids[1])) AS best_1,
        unnest(list_transform(candidate_ids, lambda ids: ids[2])) AS best_2,
        unnest(list_transform(candidate_ids, lambda ids: ids[3])) AS best_3,
        unnest(list_transform(candidate_logprobs, lambda logprobs: exp(logprobs[1]))) AS p_1,
        unnest(list_transform(candidate_logprobs, lambda logprobs: exp(logprobs[2]))) AS p_2,
        unnest(list_transform(candidate_logprobs, lambda logprobs: exp(logprobs[3]))) AS p_3
    FROM samples
)
SELECT
    sample_id, position, nullif(concat(before_3.text, before_2.text, before_1.text), '') AS before, given.text,
    logprob, rank, entropy,
    concat_ws(
        ' | ', format('{} {:.2f}', choice_1.text, p_1), format('{} {:.2f}', choice_2.text, p_2),
        format('{} {:.2f}', choice_3.text, p_3)
    ) AS choices
FROM unnested
LEFT JOIN vocab AS given USING (token_id)
LEFT JOIN vocab AS before_1 ON before_1.token_id = id_1
LEFT JOIN vocab AS before_2 ON before_2.token_id = id_2
LEFT JOIN vocab AS before_3 ON before_3.token_id = id_3
LEFT JOIN vocab AS choice_1 ON choice_1.token_id = best_1
LEFT JOIN vocab AS choice_2 ON choice_2.token_id = best_2
LEFT JOIN vocab AS choice_3 ON choice_3.token_id = best_3
WHERE position IS NOT NULL
ORDER BY entropy DESC, sample_id, position;
COMMENT ON VIEW uncertain_tokens IS 'where the teacher is least sure, with its own choices';
