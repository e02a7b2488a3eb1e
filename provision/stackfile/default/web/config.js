// Written by Platter.
'use strict';

// Converse's own parts here lead out of the rack: links to its makers and logos of
// its sponsors, fetched from them. An element that is defined already stays.
const part = (name, fill) => customElements.define(name, class extends HTMLElement {
  connectedCallback() { this.replaceChildren(...fill()); }
});
const element = (tag, properties) => Object.assign(document.createElement(tag), properties);
part('converse-controlbox-navbar', () => []);
part('converse-brand-logo', () => [
  element('img', { src: '/converse/images/logo/conversejs-filled.svg', alt: '', width: 72, height: 72 }),
  element('h1', { className: 'h3 mt-3', textContent: {{quote .Domain}} }),
]);
part('converse-footer', () => [
  element('a', { href: '/help.html', textContent: 'Help · 帮助' }),
]);

// Of a room's name it keeps Latin letters only, and has no address for 运维.
customElements.whenDefined('converse-add-muc-modal').then(modal => {
  modal.prototype.normalizeNode = name => name.trim().replace(/[\s"&'\/:<>@]+/g, '-').toLowerCase();
});

// While this node is away the page goes on through the others: it tries one after
// the other, its own first.
const ways = [location.host
{{- range .Members "web"}}{{if ne .Name $.Node}}, {{print .Address | quote}}{{end}}{{end}}].map(host => 'wss://' + host + '/ws');
const otherNodes = {
  initialize() {
    const api = this._converse.api;
    let tries = 0;
    api.listen.on('will-reconnect', () => { api.connection.get().service = ways[tries++ % ways.length]; });
    api.listen.on('reconnected', () => { tries = 0; });
  }
};

window.addEventListener('converse-loaded', event => {
  const converse = event.detail.converse;
  converse.plugins.add('platter-other-nodes', otherNodes);
  converse.initialize({
    // Where: whatever the page was opened as, then the rack's other nodes.
    assets_path: '/converse',
    websocket_url: ways[0],
    whitelisted_plugins: ['platter-other-nodes'],
    discover_connection_methods: false,
    locked_domain: {{quote .Domain}},
    muc_domain: {{print "conference." .Domain | quote}},
    locked_muc_domain: 'hidden',
    // Without any the form for a room has no field for its name; ours knows no search.
    muc_search_service: {{print "conference." .Domain | quote}},
    xmpp_providers_url: '',
    autocomplete_providers_url: '',
    embed_3rd_party_media_players: false,
    show_client_info: false,

    // Accounts are made by whoever runs the service.
    allow_registration: false,
    allow_adhoc_commands: false,

    // A dropped connection is resumed; what was said meanwhile is in the archive.
    auto_reconnect: true,
    enable_smacks: true,
    message_archiving: 'always',
    ping_interval: 20,

    // The rack is inside; there is no encryption between users on top of TLS.
    blacklisted_plugins: ['converse-omemo'],

    view_mode: 'fullscreen',
    show_controlbox_by_default: true,
    muc_nickname_from_jid: true,
    auto_join_on_invite: true,
    auto_away: 600,
    visible_toolbar_buttons: { call: false, emoji: true, location: false, spoiler: false },
    loglevel: 'warn',
  });
});
