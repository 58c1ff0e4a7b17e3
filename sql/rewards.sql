-- rewards: what kd verify-answers found out about samples, beside what was known at capture.
--
-- columns  sample_id; reward: 1 right, 0 wrong, null where it could not be judged; reason: in words
-- note     the reward that counts is that of the view samples: this one, else that of the capture. Of several rows of one
--          sample in the file the last holds
-- example  SELECT reason, count(*) FROM rewards GROUP BY ALL ORDER BY 2 DESC
CREATE OR REPLACE VIEW rewards AS
SELECT sample_id, reward, reason
FROM read_parquet(coalesce(getvariable('cache'), '.') || '/rewards.parquet', file_row_number = true)
QUALIFY row_number() OVER (PARTITION BY sample_id ORDER BY file_row_number DESC) = 1;
COMMENT ON VIEW rewards IS 'what kd verify-answers found out about samples';
