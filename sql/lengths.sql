-- lengths: how long prompts, completions and whole samples are, by source and origin.
--
-- columns     source, origin: the group
--             part: prompt, completion, or sample (both together)
--             samples: number of samples
--             least, p50, p90, p99, most (tokens): quantiles of the length of one sample's part
--             total (tokens): of all samples together
-- example     SELECT * FROM lengths WHERE part = 'sample'
CREATE OR REPLACE VIEW lengths AS
WITH parts AS (
    SELECT
        source, origin,
        unnest(['prompt', 'completion', 'sample']) AS part,
        unnest([prompt_tokens, completion_tokens, prompt_tokens + completion_tokens]) AS tokens
    FROM samples
)
SELECT
    source, origin, part, count(*) AS samples, min(tokens) AS least,
    quantile_disc(tokens, 0.5) AS p50, quantile_disc(tokens, 0.9) AS p90, quantile_disc(tokens, 0.99) AS p99,
    max(tokens) AS most, sum(tokens)::BIGINT AS total
FROM parts GROUP BY source, origin, part
ORDER BY source, origin, list_position(['prompt', 'completion', 'sample'], part);
COMMENT ON VIEW lengths IS 'quantiles of prompt and completion tokens by source and origin';
