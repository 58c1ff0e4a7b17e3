-- sample: one sample token by token, with the teacher's own choices.
--
-- parameters  id: a sample_id
-- columns     position: place in the completion, from 1
--             text: the completion's own token
--             logprob (nats), rank: the teacher's log-probability of that token, and its rank
--             entropy (nats), tail_mass (probability): as in positions
--             choices: the five best candidates with their probabilities
--             candidates: all candidates, as structs of candidate, token_id, text and logprob
-- note        The parameter cannot be named sample_id: DuckDB would put its value into the views
--             used here too.
-- example     SELECT * EXCLUDE (candidates) FROM sample('builtin:en-001:g')
CREATE OR REPLACE MACRO sample(id) AS TABLE
WITH by_position AS (
    SELECT
        position,
        string_agg(format('{} {:.2f}', text, probability), ' | ' ORDER BY candidate) FILTER (candidate <= 5) AS choices,
        list({candidate: candidate, token_id: token_id, text: text, logprob: logprob} ORDER BY candidate) AS candidates
    FROM candidates WHERE sample_id = id GROUP BY position
)
SELECT position, text, logprob, rank, entropy, tail_mass, choices, by_position.candidates
FROM positions LEFT JOIN by_position USING (position)
WHERE sample_id = id ORDER BY position;
COMMENT ON MACRO TABLE sample IS 'one sample token by token, with the teacher''s own choices';
