'use strict';

// What the page knows: the states as the disc host last told them, by name, in
// its order. Everything on the screen follows from them and from the clock.
const states = new Map();
const cards = new Map();
let clockAhead = 0; // milliseconds that the disc host's clock is ahead of ours
let lostSince = 0; // when the disc host was last heard, while it is not

const $ = id => document.getElementById(id);

// el makes an element. Text only ever enters the page through textContent.
function el(tag, className, ...children) {
  const e = document.createElement(tag);
  if (className) e.className = className;
  e.append(...children);
  return e;
}

function setText(e, text) {
  if (e.textContent !== text) e.textContent = text;
}

const stages = {
  off: 'Not seen yet. Switch it on.',
  unknown: 'Not in the rack file. Its disks are not touched.',
  booting: 'The installer is starting.',
  installing: 'The installer is at work.',
  installed: 'The disk is complete. The installed system is starting.',
  preparing: 'The host is checked and prepared.',
  joining: 'The messaging service starts and joins the cluster.',
  probing: 'In the cluster. Waits for a probe message to arrive.',
  ready: 'In service: a message has arrived.',
  failed: '',
};
const busy = new Set(['booting', 'installing', 'installed', 'preparing', 'joining', 'probing']);

function stageClass(s) {
  return Object.hasOwn(stages, s.stage) ? 'stage-' + s.stage : 'stage-off';
}

const serverNow = () => Date.now() + clockAhead;

// ms reads a time of the disc host; 0 where there is none.
function ms(time) {
  const t = time ? Date.parse(time) : NaN;
  return Number.isNaN(t) ? 0 : t;
}

function span(millis) {
  const s = Math.max(0, Math.round(millis / 1000));
  const two = n => String(n).padStart(2, '0');
  return s < 3600 ? `${Math.floor(s / 60)}:${two(s % 60)}` : `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}`;
}

function size(bytes) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let i = 0;
  for (; bytes >= 1000 && i < units.length - 1; i++) bytes /= 1024;
  return `${bytes < 10 && i > 0 ? bytes.toFixed(1) : Math.round(bytes)} ${units[i]}`;
}

// A card is the part of the page that shows one node.
function makeCard(name) {
  const c = {
    slot: el('div', 'slot'), name: el('button', 'name'), address: el('div', 'addr mono'),
    chip: el('span', 'chip'), phase: el('span', 'phase'), due: el('span', 'due'),
    bar: el('progress'), percent: el('span', 'percent'), rate: el('span', 'rate'),
    message: el('p'), next: el('p', 'next'), code: el('p', 'code mono'),
    command: el('code', 'command'), last: el('p', 'last mono'), times: new Map(),
  };
  c.name.type = 'button';
  c.name.addEventListener('click', () => openLog(name));
  c.progress = el('div', 'progress', c.bar, c.percent, c.rate);
  c.failure = el('div', 'failure', c.message, c.next, c.code);
  c.failure.setAttribute('role', 'group');
  c.failure.setAttribute('aria-label', 'Failure');
  const times = el('dl', 'times');
  for (const label of ['running', 'installed', 'ready', 'silent']) {
    const value = el('dd'), row = el('div', label, el('dt', '', label), value);
    c.times.set(label, { row, value });
    times.append(row);
  }
  c.root = el('li', 'node',
    el('div', 'who', c.slot, c.name, c.address),
    el('div', 'what', el('div', 'head', c.chip, c.phase, c.due), c.progress, c.failure, c.command, c.last), times);
  c.root.dataset.node = name;
  return c;
}

function show(e, text) {
  e.hidden = !text;
  setText(e, text || '');
}

function renderCard(s) {
  let c = cards.get(s.name);
  if (!c) cards.set(s.name, c = makeCard(s.name));
  c.root.className = 'node ' + stageClass(s);
  c.root.dataset.stage = s.stage;
  show(c.slot, s.slot);
  setText(c.name, s.name);
  c.name.setAttribute('aria-label', `${s.name}, ${s.stage}: show its log`);
  show(c.address, s.address);
  setText(c.chip, s.stage);
  c.chip.className = 'chip ' + stageClass(s);
  const place = s.phase_n && s.phase_of ? ` ${s.phase_n} of ${s.phase_of}` : '';
  show(c.phase, s.phase ? s.phase + place : stages[s.stage]);
  show(c.due, s.grant_open && !busy.has(s.stage) && s.known ? `Due for install ${s.generation}: boot it from the network.` : '');
  c.failure.hidden = !s.failure;
  show(c.message, s.failure?.message);
  show(c.next, s.failure?.next);
  show(c.code, s.failure?.code);
  show(c.last, s.failure ? '' : s.last_log);
  show(c.command, s.known ? '' : approveCommand(s));
  renderClock(s, c);
}

// approveCommand names a node that has no machine yet, if there is just one.
function approveCommand(s) {
  const waiting = [...states.values()].filter(n => n.known && !n.mac);
  return `platter node approve ${s.mac || s.name} ${waiting.length === 1 ? waiting[0].name : 'NAME'}`;
}

// renderClock shows what changes as time passes.
function renderClock(s, c) {
  const now = serverNow();
  const total = s.total || 0, done = Math.min(s.done || 0, total);
  c.progress.hidden = !total || s.stage === 'failed' || s.stage === 'ready';
  if (!c.progress.hidden) {
    c.bar.max = total;
    c.bar.value = done;
    c.bar.setAttribute('aria-label', s.phase || 'progress');
    setText(c.percent, Math.floor(100 * done / total) + ' %');
    const elapsed = now - ms(s.phase_since);
    const rate = s.phase_since && elapsed > 1000 ? done / (elapsed / 1000) : 0;
    let text = `${size(done)} of ${size(total)}`;
    if (rate >= 1) text += ` · ${size(rate)}/s`;
    if (rate >= 1 && done < total) text += ` · ${span(1000 * (total - done) / rate)} left`;
    setText(c.rate, text);
  }
  const booted = ms(s.booted_at), since = t => (booted && ms(t) >= booted ? span(ms(t) - booted) : '');
  const values = {
    running: booted && busy.has(s.stage) ? span(now - booted) : '',
    installed: since(s.installed_at),
    ready: since(s.ready_at),
    silent: busy.has(s.stage) && s.last_seen && now - ms(s.last_seen) > 60000 ? span(now - ms(s.last_seen)) : '',
  };
  for (const [label, { row, value }] of c.times) {
    row.hidden = !values[label];
    setText(value, values[label]);
  }
}

// render brings the page in line with the states.
function render() {
  place($('nodes'), [...states.values()].filter(s => s.known));
  place($('machines'), [...states.values()].filter(s => !s.known));
  for (const [name, c] of cards) {
    if (!states.has(name)) {
      c.root.remove();
      cards.delete(name);
    }
  }
  const known = [...states.values()].filter(s => s.known), strangers = states.size - known.length;
  $('empty').hidden = known.length > 0;
  $('strangers').hidden = strangers === 0;
  const count = stage => known.filter(s => s.stage === stage).length;
  const ready = count('ready'), failed = count('failed');
  const sentence = known.length && ready === known.length ? `All ${ready} ready` : `${ready} of ${known.length} ready`;
  setText($('summary'), sentence);
  const chips = ['failed', ...busy, 'off'].filter(count).map(stage => [stage, `${count(stage)} ${stage}`]);
  if (strangers) chips.push(['unknown', `${strangers} unknown`]);
  document.documentElement.classList.toggle('many', states.size > 6);
  const key = JSON.stringify(chips);
  if ($('counts').dataset.key !== key) {
    $('counts').dataset.key = key;
    $('counts').replaceChildren(...chips.map(([stage, text]) => el('li', 'chip stage-' + stage, text)));
  }
  document.title = `${failed ? `${failed} failed, ` : ''}${sentence} – Platter`;
}

// place puts the cards of these states into list, in order, and moves only
// those that are not in their place: a card that is moved loses the focus.
function place(list, wanted) {
  wanted.forEach((s, i) => {
    renderCard(s);
    const root = cards.get(s.name).root;
    if (list.children[i] !== root) list.insertBefore(root, list.children[i] || null);
  });
}

function replaceStates(list) {
  states.clear();
  for (const s of list) states.set(s.name, s);
  render();
}

function updateState(s) {
  const before = states.get(s.name);
  if (s.stage) states.set(s.name, s);
  else states.delete(s.name); // no longer listed
  render();
  if (s.stage && before?.stage !== s.stage) setText($('announce'), s.failure ? `${s.name} failed: ${s.failure.message}` : `${s.name}: ${s.stage}`);
  if (log.node === s.name) log.head();
}

// The log of one node.
const log = {
  node: '',
  last: 0, // id of the last event shown
  early: null, // what the stream brings while older lines are being fetched
  head() {
    const s = states.get(this.node);
    setText($('log-title'), this.node);
    $('log-chip').className = 'chip ' + (s ? stageClass(s) : 'stage-off');
    setText($('log-chip'), s?.stage || '');
    const facts = Object.entries(s?.facts || {}).sort(([a], [b]) => (a < b ? -1 : 1));
    for (const [k, v] of [['MAC', s?.mac], ['address', s?.address], ['slot', s?.slot]]) if (v) facts.unshift([k, v]);
    $('log-facts').replaceChildren(...facts.map(([k, v]) =>
      el('div', '', el('dt', '', k.replace(/_ms$/, '').replaceAll('_', ' ')), el('dd', 'mono', k.endsWith('_ms') ? (v / 1000).toFixed(1) + ' s' : v))));
  },
  add(events) {
    const box = $('log-lines'), atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    for (const e of events) {
      if (e.node !== this.node || (e.id && e.id <= this.last)) continue;
      if (e.id) this.last = e.id;
      for (const [text, kind] of lines(e)) {
        const time = el('time', '', new Date(e.time).toLocaleTimeString([], { hour12: false }));
        time.dateTime = e.time;
        box.append(el('p', '', time, el('span', kind, text)));
      }
    }
    if (atEnd) box.scrollTop = box.scrollHeight;
  },
  live(event) {
    if (this.early) this.early.push(event);
    else this.add([event]);
  },
  // load fetches what is missing, after a break too.
  async load() {
    const node = this.node;
    this.early ??= [];
    try {
      for (;;) {
        const events = await get(`/v1/nodes/${encodeURIComponent(node)}/log?after=${this.last}`), from = this.last;
        if (node !== this.node) return;
        this.add(events || []);
        if (this.last === from) break;
      }
    } catch (err) {
      if (node === this.node) $('log-lines').append(el('p', '', el('time'), el('span', 'bad', `The log cannot be read: ${err.message}`)));
    }
    if (node !== this.node) return;
    const early = this.early || [];
    this.early = null;
    this.add(early);
  },
};

// lines says in words what an event of the journal was.
function lines(e) {
  const r = e.report || {}, out = [];
  switch (e.kind) {
    case 'grant': out.push([`Install ${e.generation} is due. ${e.detail || ''}`, 'mark']); break;
    case 'withdraw': out.push([`Install ${e.generation} was withdrawn. ${e.detail || ''}`, 'mark']); break;
    case 'approve': out.push([`Approved: ${e.mac}`, 'mark']); break;
    case 'boot': out.push([`Asked to boot (${e.mac || ''}): ${e.action || ''}. ${e.detail || ''}`, 'mark']); break;
    case 'enrol': out.push(['Enrolled.', 'mark']); break;
    case 'probe': out.push([`Ready: a probe message arrived. ${e.detail || ''}`, 'mark']); break;
    case 'report': break;
    default: out.push([`${e.kind} ${e.detail || ''}`, '']);
  }
  if (r.stage) out.push([`Stage: ${r.stage}`, 'mark']);
  if (r.phase && !r.log && !r.total) out.push([`${r.phase}${r.phase_of ? ` (${r.phase_n} of ${r.phase_of})` : ''}`, '']);
  if (r.log) out.push([r.log, '']);
  if (r.order?.state) out.push([`order ${r.order.id} ${r.order.state}${r.order.failure ? `: ${r.order.failure.message}. ${r.order.failure.next}` : ''}`, r.order.failure ? 'bad' : '']);
  if (r.failure) out.push([`Failed: ${r.failure.message}. ${r.failure.next} (${r.failure.code})`, 'bad']);
  return out;
}

function openLog(name) {
  log.node = name;
  log.last = 0;
  log.early = null;
  $('log-lines').replaceChildren();
  log.head();
  $('log').showModal();
  log.load();
}

// get reads JSON and sets our clock by the disc host's.
async function get(url) {
  const r = await fetch(url, { cache: 'no-store', signal: AbortSignal.timeout(10000) });
  if (!r.ok) throw new Error(`the disc host answers ${r.status}`);
  const date = Date.parse(r.headers.get('Date') || '');
  // The header counts whole seconds: half a second on average is missing.
  if (!Number.isNaN(date)) clockAhead = date + 500 - Date.now();
  return r.json();
}

function lost(is) {
  if (is && !lostSince) lostSince = Date.now();
  if (!is) lostSince = 0;
  $('lost').hidden = !is;
  tick();
  document.querySelector('main').classList.toggle('stale', is);
}

// follow loads all states and then listens to what changes; after a break it
// begins anew, since it cannot know what it missed. It never ends.
async function follow() {
  for (let wait = 500; ; wait = Math.min(2 * wait, 5000)) {
    try {
      replaceStates(await get('/v1/nodes'));
      await listen(() => { wait = 250; });
    } catch { /* the banner says it */ }
    lost(true);
    await new Promise(done => setTimeout(done, wait));
  }
}

// listen returns when the stream breaks. A disc host that lost its power says
// nothing any more, so it is asked for a sign of life as well.
function listen(up) {
  return new Promise(done => {
    const stream = new EventSource('/v1/events?after=-1');
    const pulse = setInterval(() => get('/v1/nodes').catch(end), 10000);
    function end() {
      clearInterval(pulse);
      stream.close();
      done();
    }
    stream.onopen = () => {
      up();
      lost(false);
      if (log.node) log.load();
    };
    stream.onerror = end;
    stream.addEventListener('state', m => updateState(JSON.parse(m.data)));
    stream.onmessage = m => { if (log.node) log.live(JSON.parse(m.data)); };
  });
}

function tick() {
  for (const [name, c] of cards) {
    const s = states.get(name);
    if (s) renderClock(s, c);
  }
  if (lostSince) setText($('lost-detail'), `for ${span(Date.now() - lostSince)}. What is shown may be old. Trying again …`);
}

$('log-close').addEventListener('click', () => $('log').close());
$('log').addEventListener('close', () => { log.node = ''; });
$('log').addEventListener('click', e => { if (e.target === $('log')) $('log').close(); }); // beside it
setInterval(tick, 1000);
follow();
