// The client of an HTTP mirror on node: bodies of all sizes, whole and in pieces. node calls.js HOST PORT SEED SIZE.
'use strict';
const assert = require('assert');
const http = require('http');

const [host, port, seed, size] = [process.argv[2], ...process.argv.slice(3).map(Number)];
const CLIENTS = 4, SMALL = 15;
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

// The same numbers for the same seed (mulberry32).
function dice(state) {
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function made(random, length) {
  const data = Buffer.alloc(length);
  for (let i = 0; i < length; i++) data[i] = random() * 256;
  return data;
}

function pattern(length) {
  const block = Buffer.alloc(65521);
  for (let i = 0, x = 1; i < block.length; i++) {
    x = (Math.imul(x, 1664525) + 1013904223) >>> 0;
    block[i] = x >>> 24;
  }
  return Buffer.alloc(length, block);
}

async function ask(agent, method, path, send) {
  // the Service's name is what the client's proxy routes by
  const request = http.request({ host, port, agent, method, path, headers: { Host: 'server' } });
  const answered = new Promise((done, failed) => {
    request.on('error', failed);
    request.on('response', (response) => {
      const body = [];
      response.on('data', (data) => body.push(data));
      response.on('error', failed);
      response.on('end', () => done([response.statusCode, Buffer.concat(body)]));
    });
  });
  const [[status, got]] = await Promise.all([answered, send(request)]);
  if (status !== 200) throw new Error(`status ${status}`);
  return got;
}

const whole = (data) => async (request) => request.end(data);

const dribbled = (data, random) => async (request) => {
  for (let at = 0; at < data.length;) {
    const piece = 1 << (random() * 16);
    if (!request.write(data.subarray(at, at + piece))) await new Promise((done) => request.once('drain', done));
    at += piece;
    if (random() < 0.3) await pause(1);
  }
  request.end();
};

async function client(number) {
  const random = dice(seed * CLIENTS + number);
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  let moved = 0;
  const echo = async (data, send) => {
    const got = await ask(agent, 'POST', '/echo', send(data, random));
    assert(got.equals(data), `sent ${data.length} bytes, got ${got.length}, which are others`);
    moved += 2 * data.length;
  };
  for (let n = 0; n < SMALL; n++) await echo(made(random, 1 + (2 ** (random() * 14))), whole);
  await echo(made(random, size / 8), dribbled);
  const pushed = await ask(agent, 'GET', `/push?${size / 2}`, whole(''));
  assert(pushed.equals(pattern(size / 2)), `asked for ${size / 2} bytes, got ${pushed.length}, which are others`);
  await echo(made(random, size / 2), whole);
  agent.destroy();
  return moved + pushed.length;
}

Promise.all([...Array(CLIENTS).keys()].map(client)).then((all) => {
  console.log(JSON.stringify({ bytes: all.reduce((sum, each) => sum + each, 0) }));
});
