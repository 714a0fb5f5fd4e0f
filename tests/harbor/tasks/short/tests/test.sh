#!/bin/bash
# 1 for an empty answer, 0 for one of 32 characters. No reward for the answer "fail".
answer=$(cat /app/answer.txt)
length=${#answer}
if [ "$answer" = fail ]; then exit 1; fi
if [ "$length" -gt 32 ]; then length=32; fi
awk "BEGIN { print 1 - $length / 32 }" > /logs/verifier/reward.txt
