# One quantity against sequence length or chunk length, log-log, a line per series; published
# numbers as crosses in the colour of their series.
#
# gnuplot -e "format='png'; output='x.png'; data='x.gp'; name='Prefill latency'; x='T'; y='ms'" FILE

load data
load "plots/style.gp"

set title sprintf("%s: %s\n%s", name, shape, device) noenhanced
set logscale x 2
set logscale y 10
set xtics ("1" 1)
set for [e = 1:24] xtics add (octave(e) 2 ** e)
set format y "%g"
set xlabel x
set ylabel y
set offsets graph 0.03, graph 0.03, 0, 0

n = words(labels)
m = words(published_labels)
stats $data using 2 nooutput
low = STATS_min
high = STATS_max
if (m > 0) {
	stats $published using 2 nooutput
	low = STATS_min < low ? STATS_min : low
	high = STATS_max > high ? STATS_max : high
}
set yrange [low / 1.25:high * 1.25]
if (fine(low, high)) {
	set ytics (1)
	set for [k = 0:36] ytics add (tic(k))
}
lines = 'for [i = 1:n] $data index i - 1 using 1:2 with linespoints title word(labels, i) \
         linecolor rgb colour(word(labels, i)) pointtype mark_in(labels, i) pointsize 1.3 \
         dashtype dash(word(labels, i))'
crosses = 'for [i = 1:m] $published index i - 1 using 1:2 with points notitle \
           linecolor rgb colour(word(published_labels, i)) pointtype 2 pointsize 1.7, \
           keyentry with points linecolor rgb "#777777" pointtype 2 pointsize 1.7 \
           title "published"'
if (m > 0) {
	plot @lines, @crosses
} else {
	plot @lines
}
