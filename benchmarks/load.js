// Load at a fixed rate, whatever the server does: k6 run -e PLAN=plan.json load.js (see `Load` in serving.py).
//
// Latencies are taken apart by phase and by what came back, counts by phase and kind; both land in the plan's summary.
import http from 'k6/http';
import exec from 'k6/execution';
import { Counter, Gauge, Trend } from 'k6/metrics';

const plan = JSON.parse(open(__ENV.PLAN));
const body = open(plan.body, 'b');
const params = {
  headers: plan.headers,
  timeout: `${plan.timeout_s}s`,
  responseType: plan.expected ? 'text' : 'none',
};
const kinds = ['200', '503', '4xx', '5xx', 'timeout', 'refused', 'reset', 'no answer', 'wrong answer'];
const metrics = {};
for (const phase of plan.phases) {
  const one = { ok: new Trend(`${phase.name}_ok`), shed: new Trend(`${phase.name}_shed`), counts: {} };
  one.started = new Gauge(`${phase.name}_started`);
  kinds.forEach((kind, number) => { one.counts[kind] = new Counter(`${phase.name}_kind${number}`); });
  metrics[phase.name] = one;
}
const seen = {};

export const options = {
  scenarios: Object.fromEntries(plan.phases.map((phase) => [phase.name, {
    executor: 'constant-arrival-rate',
    rate: Math.max(1, Math.round(phase.rate * 10)),
    timeUnit: '10s',
    duration: `${phase.seconds}s`,
    startTime: `${phase.starts_at_s}s`,
    preAllocatedVUs: plan.callers,
    maxVUs: plan.most_callers,
    gracefulStop: `${plan.timeout_s}s`,
  }])),
  summaryTrendStats: ['p(50)', 'p(95)', 'p(99)', 'p(99.9)', 'max', 'count'],
};

export default function () {
  const phase = metrics[exec.scenario.name];
  const answer = http.request('POST', plan.url, body, params);
  const kind = kindOf(answer);
  const milliseconds = answer.timings.blocked + answer.timings.duration;
  phase.counts[kind].add(1);
  if (kind === '200') phase.ok.add(milliseconds);
  if (kind === '503') phase.shed.add(milliseconds);
  phase.started.add(exec.scenario.startTime);
  noteReplica(answer);
}

function kindOf(answer) {
  if (answer.status === 200) return isRight(answer) ? '200' : 'wrong answer';
  if (answer.status === 503) return '503';
  if (answer.status >= 400) return answer.status < 500 ? '4xx' : '5xx';
  if (answer.error_code === 1050 || answer.error_code === 1211) return 'timeout';
  if (answer.error_code === 1212) return 'refused';
  if (answer.error_code === 1220) return 'reset';
  return 'no answer';
}

// The probabilities have to be those of the version that the answer says it is of.
function isRight(answer) {
  if (!plan.expected) return true;
  const expected = plan.expected[answer.headers[plan.version_header]];
  if (!expected) return false;
  const found = answer.json().predictions[0].probabilities;
  return found.length === expected.length && found.every((value, i) => Math.abs(value - expected[i]) < 1e-4);
}

// The first time that one of these callers meets a replica is a line of the log.
function noteReplica(answer) {
  const replica = plan.replica_header && answer.headers[plan.replica_header];
  if (!replica || seen[replica]) return;
  seen[replica] = true;
  console.log(JSON.stringify({ replica, at: Date.now() / 1000 }));
}

export function handleSummary(data) {
  const values = Object.fromEntries(Object.entries(data.metrics).map(([name, metric]) => [name, metric.values]));
  return { [plan.summary]: JSON.stringify({ kinds, values }) };
}
