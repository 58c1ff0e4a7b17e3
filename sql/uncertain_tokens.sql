-- uncertain_tokens: where the teacher is least sure, most uncertain first.
--
-- columns  sample_id, position; before: the three tokens before; text: the token given; its logprob (nats) and rank;
--          entropy (nats, a lower bound); choices: the teacher's three best with their probabilities (fewer, or drawn
--          ones, where a threshold:TAU cache holds no more)
-- example  SELECT * FROM uncertain_tokens LIMIT 10
CREATE OR REPLACE VIEW uncertain_tokens AS
WITH placed AS (
    SELECT
        *,
        string_agg(text, '') OVER (
            PARTITION BY sample_id ORDER BY position ROWS BETWEEN 3 PRECEDING AND 1 PRECEDING
        ) AS before
    FROM positions
), best AS (
    SELECT
        sample_id, position,
        string_agg(format('{} {:.2f}', text, probability), ' | ' ORDER BY candidate) AS choices
    FROM candidates WHERE candidate <= 3 GROUP BY ALL
)
SELECT sample_id, position, before, text, logprob, rank, entropy, choices
FROM placed JOIN best USING (sample_id, position) ORDER BY entropy DESC;
COMMENT ON VIEW uncertain_tokens IS 'where the teacher is least sure, with what it would rather have said';
