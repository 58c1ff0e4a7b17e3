-- rewards: the verdicts of kd verify-answers, one row per sample.
--
-- columns     sample_id: the sample
--             reward: 1 if right, 0 if wrong, null if it could not be judged
--             reason: the verdict in words
-- note        The view samples already takes these rewards before those of the capture. Where the
--             file has several rows for a sample, the last one counts.
-- example     SELECT reason, count(*) FROM rewards GROUP BY ALL ORDER BY 2 DESC
CREATE OR REPLACE VIEW rewards AS
SELECT sample_id, reward, reason
FROM read_parquet(coalesce(getvariable('cache'), '.') || '/rewards.parquet', file_row_number = true)
QUALIFY row_number() OVER (PARTITION BY sample_id ORDER BY file_row_number DESC) = 1;
COMMENT ON VIEW rewards IS 'the verdicts of kd verify-answers';
