"""The look and the scripts the search report and the atlas page share; no request leaves a page."""

import html
import json
from typing import Any

STYLE = """
:root{--ink:#1c2330;--soft:#667;--line:#d8dce6;--paper:#fff;--mark:#0a6;--alt:#c53}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9f0;--soft:#99a;--line:#39404e;--paper:#12151b;
--mark:#3c9;--alt:#f85}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:72rem;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse}
td,th{padding:.2rem .6rem;border-bottom:1px solid var(--line);text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.soft{color:var(--soft)}
.scroll{overflow-x:auto}.cell{display:inline-block;margin:3px;text-align:center;font-size:11px;
border:2px solid transparent;background:none;color:inherit;cursor:pointer;padding:2px}
.cell canvas{width:72px;height:72px;image-rendering:pixelated;display:block}
.cell[aria-pressed=true]{border-color:var(--alt)}.cell.edited{border-color:var(--mark)}
svg text{font-size:11px;fill:var(--ink)}button,select{font:inherit;color:inherit}
#side{position:sticky;top:0;background:var(--paper);padding:.5rem 0;max-height:50vh;overflow-y:auto}
"""

ATLAS_SCRIPT = """
const A=JSON.parse(document.getElementById('atlas').textContent);
const at=(l,r,h)=>A.cells[(l*(A.ranges.length-1)+r)*A.heads+h];
const place=document.getElementById('heads'),side=document.getElementById('side');
const pick=document.getElementById('range');let open=null;
const names=A.candidates.map(c=>c.name);
for(let r=0;r<A.ranges.length-1;r++)pick.add(new Option('steps '+
 (100*A.ranges[r]).toFixed(0)+'-'+(100*A.ranges[r+1]).toFixed(0)+' %',r));
const first=A.cells.map(c=>c.choice),of=c=>c.choices||[c.choice];
function paint(canvas,map){const n=Math.round(Math.sqrt(map.length));canvas.width=canvas.height=n;
 const g=canvas.getContext('2d'),d=g.createImageData(n,n);
 map.forEach((v,i)=>{d.data[4*i]=Math.min(255,v*1.6);d.data[4*i+1]=v*.9;
  d.data[4*i+2]=80+v*.5;d.data[4*i+3]=255});g.putImageData(d,0,0)}
function draw(){place.textContent='';const r=+pick.value;
 for(let l=0;l<A.layers;l++){const row=document.createElement('div');
  row.append('layer '+l+' ');
  for(let h=0;h<A.heads;h++){const c=at(l,r,h),b=document.createElement('button');
   b.className='cell';b.type='button';
   b.setAttribute('aria-pressed',open&&open.l==l&&open.h==h?'true':'false');
   if(c.choice!=first[A.cells.indexOf(c)])b.classList.add('edited');
   const k=document.createElement('canvas');paint(k,c.map);b.append(k,
    'h'+h+' '+c.class,document.createElement('br'),
    [...new Set(of(c).map(i=>A.candidates[i].method))].join(' / '));
   b.title='layer '+l+', head '+h+': '+of(c).map(i=>names[i]).join(' / ');
   b.onclick=()=>{open={l,h};draw();show()};row.append(b)}
  place.append(row)}}
function show(){if(!open)return;const r=+pick.value,c=at(open.l,r,open.h);side.textContent='';
 const t=document.createElement('table'),add=(cells,head)=>{const x=t.insertRow();
  cells.forEach((v,i)=>{const e=document.createElement(head?'th':'td');e.append(v);
   if(i&&i<4)e.className='n';x.append(e)});return x};
 const h=document.createElement('h2');h.textContent='layer '+open.l+', head '+open.h+': '+c.class;
 const p=document.createElement('p');p.className='soft';p.textContent=A.bands.map((b,i)=>
  b.replace('_',' ')+' '+(100*c.bands[i]).toFixed(0)+' % (uniform '+
  (100*A.uniform[i]).toFixed(0)+' %)').join(', ');
 add(['candidate','density','relative error','per branch',''],1);
 c.error.map((e,i)=>i).sort((a,b)=>(c.error[a]??9e9)-(c.error[b]??9e9)||a-b).forEach(i=>{
  const b=document.createElement('button'),on=of(c).includes(i);
  b.textContent=!on?'choose':
   c.choices?'chosen for '+['cond','uncond'][c.choices.indexOf(i)]:'chosen';
  b.disabled=on&&!c.choices||c.error[i]==null;
  b.onclick=()=>{c.choice=i;delete c.choices;draw();show();sum()};
  add([names[i],A.candidates[i].density.toFixed(3),c.error[i]==null?'cannot run':
   c.error[i].toFixed(4),c.branches.map(x=>x[i]==null?'-':x[i].toFixed(3)).join(' / '),b])});
 const s=document.createElement('div');s.className='scroll';s.append(t);side.append(h,p,s)}
function density(){let d=0,n=0;A.cells.forEach(c=>{const w=A.range_steps[c.range];
 of(c).forEach(i=>d+=w*A.candidates[i].density/of(c).length);n+=w});return d/n}
function sum(){document.getElementById('density').textContent=density().toFixed(3)}
function rules(){const out=[];A.cells.forEach(c=>{if(!A.range_steps[c.range])return;
 of(c).forEach((i,n)=>{if(!i)return;const k=A.candidates[i];
 if(!k.params)throw Error(k.name+' needs tensors');
 out.push({layers:[c.layer],heads:[c.head],steps:[A.ranges[c.range],A.ranges[c.range+1]],
  ...(c.choices?{branch:['cond','uncond'][n]}:{}),method:k.method,params:k.params})})});return out}
const button=document.getElementById('export');
if(button)button.onclick=()=>{let text;try{text=JSON.stringify({format:'dittools-plan',version:1,
 model:A.model,schedule:{dense_first_steps:0,dense_last_steps:0,dense_layers:0},rules:rules(),
 provenance:{by:'edited in dittools inspect'},measured:{}},null,1)}
 catch(e){alert(e.message);return}
 const a=document.createElement('a');a.href=URL.createObjectURL(new Blob([text+'\\n'],
  {type:'application/json'}));a.download='plan.json';a.click()};
pick.onchange=()=>{draw();show()};draw();sum();
"""


def document(title: str, body: str, data: dict[str, Any], script: str) -> str:
    """Return a whole page; the data is embedded as JSON that cannot close its element."""
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><body>"
        f"<h1>{html.escape(title)}</h1>{body}"
        f'<script id="atlas" type="application/json">{text}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def atlas_body(can_export: bool) -> str:
    """Return the atlas's markup; the script fills it."""
    button = '<button id="export" type="button">export plan</button>' if can_export else ""
    return (
        '<h2>Head atlas</h2><p><label>step range <select id="range"></select></label> '
        f'mean density of the choice: <b id="density"></b> {button}</p>'
        '<div id="side" class="soft">Click a head to see its candidates and their errors.</div>'
        '<div id="heads" class="scroll"></div>'
    )


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Return an HTML table; numbers are set to the right."""

    def cell(value: Any, tag: str) -> str:
        right = ' class="n"' if isinstance(value, (int, float)) else ""
        shown = f"{value:.3f}" if isinstance(value, float) else value
        return f"<{tag}{right}>{html.escape(str(shown))}</{tag}>"

    lines = ["".join(cell(h, "th") for h in head)]
    lines += ["".join(cell(v, "td") for v in row) for row in rows]
    inner = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{inner}</table></div>'
